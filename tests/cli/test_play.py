"""Playing an episode: the transcript, a person's lines, and the verdict."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import pairwise

import pytest
from rich.console import Console

from oldlogits.cli.main import run as command
from oldlogits.cli.play import PlayOptions, play
from oldlogits.core.errors import ConfigError, ModelFolderError
from oldlogits.envs.tools import tool_names
from oldlogits.record.folder import RunFolder
from order_desk.data import WORDS
from order_desk.environment import OrderDesk
from order_desk.tiny import TinySize, save_tiny, tiny_model, tiny_tokenizer

from ..runs import recipe

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


def _shown(*lines: str, target: str = "desk", width: int = 120, **options: object) -> tuple[float, str]:
    """The reward and the transcript of one episode."""
    console = Console(width=width)
    with console.capture() as capture:
        reward = play(PlayOptions(target=target, **options), 0, console, _lines(*lines)).reward
    return reward, capture.get()


def _played(*lines: str, target: str = "desk", row=ROW) -> tuple[float, str]:
    return _shown(*lines, target=target, row=json.dumps(row))


@pytest.mark.parametrize("target", ["desk", "desk_long"])
def test_the_oracle_is_rewarded_on_every_split_and_its_transcript_ends_with_the_reward(target):
    for split in ("train", "heldout"):
        reward, text = _shown(target=target, mode="oracle", split=split, index=1)
        assert reward == 1.0
        assert "A shipped order that is to be cancelled or refunded is transferred" in text, "the policy"
        assert text.rstrip().endswith("reward 1")


def test_a_person_writes_calls_and_messages_and_sees_what_the_agent_would_see():
    reward, text = _played("which order ?", "status o10", "cancel o10", "it is cancelled")
    assert reward == 1.0
    said = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
    dialogue = [line for line in said if line[0] in ("user", "agent", "tool")]
    assert [(who, what.strip()) for who, what in dialogue] == [
        ("user", "anna here : please cancel my lamp order"),
        ("agent", "which order ?"),
        ("user", "it is o10"),
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


@pytest.mark.parametrize("word", ["", "  ", "?", "help", "HELP"])
def test_who_does_not_know_what_to_write_is_helped_and_the_episode_goes_on(word):
    reward, text = _played(word, "which order ?", word, "cancel o10", "it is cancelled")
    assert reward == 1.0
    assert text.count("Write a call, its arguments after it") == 3


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


def test_ctrl_c_at_the_prompt_leaves_as_the_end_of_the_input_does():
    def interrupt(_: str) -> str:
        raise KeyboardInterrupt

    console = Console(width=120)
    with console.capture() as capture:
        assert play(PlayOptions(target="desk", row=json.dumps(ROW)), 0, console, interrupt).reward == 0.0
    assert "the agent left" in capture.get()
    assert capture.get().rstrip().endswith("reward 0")


def test_a_class_of_ones_own_with_async_tools_and_no_partner_is_played():
    reward, text = _played("guess 3", "guess 4", "I give up", target=RIDDLE, row={"answer": 4})
    assert reward == 1.0
    assert [line.split()[1] for line in text.splitlines() if line.split()[:1] == ["tool"]] == ["no", "yes"]


def test_markup_in_what_is_said_is_printed_as_it_is():
    _, text = _played("[bold]hello[/bold] [/x]")
    assert "[bold]hello[/bold] [/x]" in text


def test_what_cannot_be_played_is_a_config_error():
    with pytest.raises(ConfigError, match="makes no rows"):
        _shown(target=RIDDLE)
    with pytest.raises(ConfigError, match="mode 'oracle' cannot play Riddle"):
        _shown(target=RIDDLE, mode="oracle", row='{"answer": 1}')
    with pytest.raises(ConfigError, match="mode 'checkpoint'"):
        _shown(mode="checkpoint")


def test_what_an_environment_raises_ends_the_episode_and_is_shown():
    reward, text = _played("guess 3", target=f"{__name__}:Broken", row={"answer": 4})
    assert "the episode ended early: guess: RuntimeError: lost" in text
    assert reward == 0.0


def test_what_an_environment_raises_is_status_1_and_is_counted(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("guess 3\nguess 3\n"))
    words = ["play", f"{__name__}:Broken", "--row", '{"answer": 4}', "--num-episodes", "2"]
    assert command(words) == 1
    shown = capsys.readouterr().out
    assert shown.count("the episode ended early: guess: RuntimeError: lost") == 2
    assert shown.rstrip().endswith("mean reward of 2 episodes: 0.000; 2 of them failed")


class Broken(Riddle):
    """Guess."""

    def guess(self, number: int) -> str:
        """Guess a number."""
        raise RuntimeError("lost")


def test_a_recipe_names_environment_and_rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"answer": 4}\n{"answer": 5}\n')
    (tmp_path / "riddle.toml").write_text(f'[env]\ntarget = "{RIDDLE}"\neval_data = "rows.jsonl"\n')
    reward, _ = _shown("guess 5", "done", target="riddle.toml", index=1)
    assert reward == 1.0


@pytest.fixture(scope="module")
def clerk_folder(tmp_path_factory):
    """A model that knows the desk's words and nothing of the desk."""
    tokenizer = tiny_tokenizer([*WORDS, *tool_names(OrderDesk)])
    size = TinySize(hidden=32, layers=1, heads=2, kv_heads=1, mlp=32, max_context=512)
    model = tiny_model(size, len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id, seed=0)
    folder = tmp_path_factory.mktemp("clerk")
    save_tiny(folder, model, tokenizer)
    return folder


def _watched(*words: object, capsys) -> list[str]:
    assert command(["play", "desk", "--mode", "checkpoint", *map(str, words)]) == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.slow
def test_a_checkpoint_plays_through_the_turn_loop_and_is_judged(clerk_folder, capsys):
    lines = _watched("--model", clerk_folder, "--index", 3, capsys=capsys)
    said = [line.split(maxsplit=1) for line in lines if line.strip()]
    who = [words[0] for words in said if words[0] in ("user", "agent", "tool")]
    assert who[:2] == ["user", "agent"]
    assert said[[words[0] for words in said].index("user")][1].strip() == OrderDesk().reset(**OrderDesk.make_row("heldout", 3))
    assert lines[-1] == "reward 0"
    assert lines == _watched("--model", clerk_folder, "--index", 3, capsys=capsys), "the seed decides"
    assert lines != _watched("--model", clerk_folder, "--index", 3, "--seed", 1, capsys=capsys)
    greedy = [_watched("--model", clerk_folder, "--greedy", "--seed", seed, capsys=capsys) for seed in (0, 1)]
    assert greedy[0] == greedy[1]


def test_of_a_run_folder_the_latest_checkpoint_plays_under_its_recipe(clerk_folder, tmp_path, capsys):
    config = recipe(clerk_folder)
    config = replace(config, env=replace(config.env, max_turns=1, max_tokens_per_turn=2))
    folder = RunFolder.create(tmp_path / "run")
    folder.write_config(asdict(config))
    with pytest.raises(ConfigError, match="the run has no checkpoint yet"):
        _shown(mode="checkpoint", model=str(folder.path))
    for version in (2, 10):
        partial = folder.begin_checkpoint(version)
        shutil.copytree(clerk_folder, partial / "model", dirs_exist_ok=True)
        folder.name_checkpoint(partial)
    (folder.checkpoints / "v000002" / "model" / "model.safetensors").unlink()
    lines = _watched("--model", folder.path, "--num-episodes", 2, capsys=capsys)
    agent = [line.split()[1:] for line in lines if line.split()[:1] == ["agent"]]
    assert [len(words) for words in agent] == [2, 2], "one turn of two tokens in each episode"
    assert sum("the episode ended early: turn_too_long" in line for line in lines) == 2
    assert lines[-1] == "mean reward of 2 episodes: 0.000"


@pytest.mark.slow
def test_what_a_checkpoint_writes_wrongly_is_answered_as_in_training(tiny_folder):
    answers = []
    for seed in range(40):
        options = {"target": RIDDLE, "mode": "checkpoint", "row": '{"answer": 1}', "model": str(tiny_folder), "seed": seed}
        reward, text = _shown(width=500, **options)
        assert reward == 0.0
        lines = [line.split() for line in text.splitlines()]
        answers += [b[1:] for a, b in pairwise(lines) if a[:1] == ["agent"] and "</call>" in a and b[:1] == ["tool"]]
    assert len(answers) >= 5
    assert all(answer[:2] == ["error", ":"] for answer in answers)


def test_a_model_that_is_not_there_is_refused(tmp_path, capsys):
    with pytest.raises(ModelFolderError, match=r"model\.path is no folder"):
        _shown(mode="checkpoint", model=str(tmp_path / "gone"))
    assert command(["play", "desk", "--mode", "checkpoint"]) == 2
    assert "add --model runs/" in capsys.readouterr().err


def test_a_row_is_given_on_the_command_line(capsys):
    assert command(["play", "desk", "--mode", "oracle", "--row", json.dumps(ROW)]) == 0
    shown = capsys.readouterr().out
    assert "anna here : please cancel my lamp order" in shown
    assert shown.endswith("reward 1\n")
    for row, says in (("{", "--row is no JSON"), ("[1]", "--row is no JSON object")):
        assert command(["play", "desk", "--mode", "oracle", "--row", row]) == 2
        assert says in capsys.readouterr().err


@pytest.fixture
def run(clerk_folder, tmp_path):
    """A run with two checkpoints, whose episodes are one turn of two tokens."""
    config = recipe(clerk_folder)
    config = replace(config, env=replace(config.env, target="desk", max_turns=1, max_tokens_per_turn=2))
    folder = RunFolder.create(tmp_path / "run")
    folder.write_config(asdict(config))
    for version in (2, 10):
        partial = folder.begin_checkpoint(version)
        shutil.copytree(clerk_folder, partial / "model", dirs_exist_ok=True)
        folder.name_checkpoint(partial)
    return folder


def _turns(text: str) -> list[int]:
    return [len(line.split()) - 1 for line in text.splitlines() if line.split()[:1] == ["agent"]]


def test_a_recipe_that_is_named_supplies_parser_and_limits_whatever_run_the_model_is_of(run, tmp_path):
    (tmp_path / "own.toml").write_text('[env]\ntarget = "desk"\nmax_turns = 1\nmax_tokens_per_turn = 3\n')
    _, text = _shown(target=str(tmp_path / "own.toml"), model=str(run.path))
    assert _turns(text) == [3]
    _, text = _shown(target="desk", model=str(run.checkpoints / "v000002"))
    assert _turns(text) == [2], "an environment's name alone: as in the model's run"


def test_a_run_folder_is_a_target_and_its_own_model(run):
    _, text = _shown(target=str(run.path), mode="checkpoint")
    assert _turns(text) == [2]


def test_an_agent_program_is_not_played_turn_by_turn(tmp_path):
    (tmp_path / "program.toml").write_text('[env]\ncommand = ["true"]\n')
    with pytest.raises(ConfigError, match="oldlogits eval MODEL"):
        _shown(target=str(tmp_path / "program.toml"))
