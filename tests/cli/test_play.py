"""Playing an episode: the transcript, a person's lines, and the verdict."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from rich.console import Console

from oldlogits.cli.play import play
from oldlogits.core.errors import ConfigError

ROW = {
    "customer": "anna",
    "orders": {"o10": {"customer": "anna", "item": "lamp", "status": "pending", "days": 0}},
    "wishes": [{"kind": "cancel", "order": "o10", "withheld": True}],
}


class Riddle:
    """Guess."""

    def reset(self, answer: int) -> None:
        self._answer, self._hits = answer, 0

    def get_reward(self) -> float:
        return float(self._hits)

    async def guess(self, number: int) -> str:
        """Guess a number."""
        self._hits += number == self._answer
        return "yes" if number == self._answer else "no"


RIDDLE = f"{__name__}:Riddle"


def _lines(*lines: str) -> Callable[[str], str]:
    waiting = iter(lines)

    def read(_: str) -> str:
        try:
            return next(waiting)
        except StopIteration:
            raise EOFError from None

    return read


def _played(*lines: str, target: str = "desk", row=ROW) -> tuple[float, str]:
    console = Console(width=120)
    with console.capture() as capture:
        reward = play(target, "human", row=row, console=console, read=_lines(*lines))
    return reward, capture.get()


def test_the_oracle_is_rewarded_on_every_split_and_its_transcript_ends_with_the_reward():
    for split in ("train", "heldout"):
        console = Console(width=120)
        with console.capture() as capture:
            assert play("desk", "oracle", split=split, index=1, console=console) == 1.0
        assert capture.get().rstrip().endswith("reward 1")


def test_a_person_writes_calls_and_messages_and_sees_what_the_agent_would_see():
    reward, text = _played("which order ?", "status o10", "cancel o10", "it is cancelled")
    assert reward == 1.0
    said = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
    dialogue = [line for line in said if line[0] in ("customer", "agent", "tool")]
    assert [(who, what.strip()) for who, what in dialogue] == [
        ("customer", "anna here : please cancel my lamp order"),
        ("agent", "which order ?"),
        ("customer", "it is o10"),
        ("agent", "status o10"),
        ("tool", "pending"),
        ("agent", "cancel o10"),
        ("tool", "ok"),
        ("agent", "it is cancelled"),
    ]


def test_a_wrong_call_is_answered_as_the_agent_would_be_and_play_goes_on():
    reward, text = _played("cancel", "<call> fly o10 </call>", "which order ?", "cancel o10", "it is cancelled")
    assert "error : cancel takes order but got nothing" in text
    assert "error : no tool fly" in text
    assert reward == 1.0


def test_a_wrong_end_is_explained():
    reward, text = _played("which order ?", "it is cancelled")
    assert reward == 0.0
    assert "o10 should be cancelled, but is pending" in text
    reward, text = _played("which order ?", "cancel o10", "it is refunded")
    assert "should have been told cancelled, but was told refunded" in text
    reward, text = _played("hello")
    assert "the customer left: a message did not tell exactly one outcome" in text


def test_leaving_in_the_middle_still_gives_the_verdict():
    reward, text = _played("which order ?")
    assert reward == 0.0
    assert "the agent left" in text
    assert "was told nothing" in text


def test_a_class_of_ones_own_with_async_tools_and_no_partner_is_played():
    reward, text = _played("guess 3", "guess 4", "I give up", target=RIDDLE, row={"answer": 4})
    assert reward == 1.0
    assert [line.split()[1] for line in text.splitlines() if line.split()[:1] == ["tool"]] == ["no", "yes"]


def test_markup_in_what_is_said_is_printed_as_it_is():
    _, text = _played("[bold]hello[/bold] [/x]")
    assert "[bold]hello[/bold] [/x]" in text


def test_what_cannot_be_played_is_a_config_error():
    console = Console(quiet=True)
    with pytest.raises(ConfigError, match="makes no rows"):
        play(RIDDLE, "human", console=console)
    with pytest.raises(ConfigError, match="mode 'oracle' cannot play Riddle"):
        play(RIDDLE, "oracle", row={"answer": 1}, console=console)
    with pytest.raises(ConfigError, match="mode 'checkpoint'"):
        play("desk", "checkpoint", console=console)
