"""Games of TextArena for one player: by the class of docs/environments.md, and by verifiers' own environment of them."""

import asyncio
import re
from pathlib import Path

import pytest

from oldlogits.core.trajectory import Sampled
from oldlogits.envs.base import load_environment
from oldlogits.envs.tools import tool_schemas
from oldlogits.rollout.environment_runner import ThreadRunner
from oldlogits.rollout.player import ClassPlayer

from ...rollout.test_conversations import CHAT, END, Engine, Talk, spell
from .test_verifiers import config_of, scripted

pytestmark = [
    pytest.mark.envs,
    pytest.mark.timeout(240),
    pytest.mark.filterwarnings("ignore:invalid escape sequence"),  # in the games' code, where it is compiled first
]

DOCUMENT = (Path(__file__).parents[3] / "docs" / "environments.md").read_text(encoding="utf-8")


@pytest.fixture
def guess(tmp_path, monkeypatch):
    """The class of the document."""
    [written] = [text for text in re.findall(r"```python\n(.*?)```", DOCUMENT, flags=re.DOTALL) if "textarena" in text]
    (tmp_path / "guess_game.py").write_text(written)
    monkeypatch.syspath_prepend(tmp_path)
    return load_environment("guess_game:GuessTheNumber")


def spelled(trajectory):
    """What the model said."""
    return [CHAT.decode(s.token_ids[:-1]) for s in trajectory.segments if isinstance(s, Sampled)]


def halving(prompt):
    """Guess in the middle of what the hints leave."""
    low, high = 1, 20
    said = re.findall(r"\[(\d+)\]<\|im_end\|>\s*<\|im_start\|>user\s*The target number is (\w+)", CHAT.decode(prompt))
    for number, hint in said:
        low, high = (int(number) + 1, high) if hint == "higher" else (low, int(number) - 1)
    return (*spell(f"[{(low + high) // 2}]"), END)


def test_each_message_is_a_move_and_the_outcome_of_the_game_the_reward(guess):
    assert tool_schemas(guess) == []
    rows = [guess.make_row(split, index) for split in ("train", "heldout") for index in range(8)]
    assert len({row["seed"] for row in rows}) == 16

    async def play(says):
        agent = Talk(Engine(says=says)).agent
        object.__setattr__(agent, "run_environment", ThreadRunner(timeout_s=60, latency_s=0, seed=0))
        player = ClassPlayer(agent=agent, environment_class=guess)
        return await asyncio.gather(*(player.play(row, id=f"e.{i}", group_id="e") for i, row in enumerate(rows)))

    found = [one for (one,) in asyncio.run(play(halving))]
    assert {(one.reward, one.stop_reason) for one in found} == {(1.0, "done")}
    turns = [spelled(one) for one in found]
    assert {said[0] for said in turns} == {"[10]"}
    assert max(map(len, turns)) <= 5
    assert len({said[-1] for said in turns}) > 4, "games of different numbers"
    again = [one for (one,) in asyncio.run(play(halving))]
    assert [spelled(one) for one in again] == turns, "a row is one game"
    assert {one.reward for (one,) in asyncio.run(play(lambda prompt: (*spell("twelve"), END)))} == {0.0}


@pytest.fixture
def words(tmp_path, monkeypatch):
    """A list of words where the games look for theirs, and no way to another one."""
    folder = tmp_path / "corpora" / "words"
    folder.mkdir(parents=True)
    (folder / "en").write_text("lamp\n")
    (folder / "en-basic").write_text("lamp\n")
    monkeypatch.setattr("nltk.data.path", [str(tmp_path)])
    for name in ("HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")


def test_verifiers_own_environment_of_the_games_is_played(installed, words):
    args = {"taskset": {"game": "Hangman-v0"}, "select": {"limit": 10}, "player": {"harness": {"id": "word_talk"}}}
    for last, reward in (("[LAMP]", 1.0), ("[LAMB]", 0.0)):
        ((played,),), _ = scripted(config_of("textarena", args, max_turns=3), ["[A]", "[P]", last])
        assert spelled(played) == ["[A]", "[P]", last]
        assert played.reward == reward
