"""Several environments in one run: the row says which one plays, and the agent sees the tools of that one alone."""

from __future__ import annotations

import io
import json
from collections import Counter as Tally
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
from rich.console import Console

from oldlogits.cli.main import run as command
from oldlogits.cli.play import PlayOptions
from oldlogits.cli.play import play as play_by_hand
from oldlogits.config.check import check
from oldlogits.config.load import config_from_table, override
from oldlogits.core.errors import ConfigError
from oldlogits.core.trajectory import Context
from oldlogits.envs.base import load_environment, named_parts
from oldlogits.envs.delegate import BY, players_of
from oldlogits.envs.rows import row_misfit
from oldlogits.envs.tools import can_be_saved, tool_schemas
from oldlogits.models.chat.format import ChatFormat
from oldlogits.record.evaluation import by_environment, read_summary
from oldlogits.record.event_log import read_events
from oldlogits.record.events import Evaluated
from oldlogits.record.intervals import mean_interval, reward_of
from oldlogits.record.live.conclusion import print_summary
from oldlogits.rollout.tasks import MixedRows, MixtureDataset
from oldlogits.run.run import run
from oldlogits.run.start import prepare_model
from oldlogits.run.tasks import load_tasks

from ..models.tokenizers import WITH_TOOLS, byte_level
from ..rollout.test_agents_words import Echo, call, play
from ..runs import Words, recipe, summary_of, write_recipe


class Greeter:
    """Talks, and is saved."""

    tool_errors = ValueError

    @staticmethod
    def make_row(split, index):
        return {"name": f"{split}{index}"}

    def reset(self, name):
        self.heard, self.system_prompt = [], f"be kind to {name}"
        return f"I am {name}"

    def reply(self, message):
        self.heard.append(message)
        return "go on" if len(self.heard) < 2 else None

    def get_reward(self):
        return float(len(self.heard))

    def save_state(self):
        return self.heard

    def load_state(self, state):
        self.heard, self.system_prompt = state, ""

    def explain_reward(self):
        return "because"


class EchoAgain(Echo):
    @staticmethod
    def make_row(split, index):
        return {"said": f"{split}{index}"}


class Refusing(Greeter):
    def give(self, value: int) -> int:
        """Give."""
        raise ValueError(f"no {value}")


HERE = __name__
PARTS = [{"target": f"{HERE}:Greeter", "weight": 2}, {"target": f"{HERE}:EchoAgain", "weight": 1}]


def mixed(*parts, **env):
    return config_from_table(
        {"env": {"mixture": list(parts or PARTS), **env}, "seed": 5, "model": {"path": "folder/of/a/model"}}
    )


def loaded(*parts):
    return load_environment("desk", mixture=mixed(*parts).env.mixture)


def played(environment, row, *turns):
    chat = ChatFormat(byte_level(WITH_TOOLS), tool_schemas(environment))
    outcome = play(chat, "hermes", [*turns, *["bye"] * 4], row, environment)
    return outcome, [chat.decode(s.token_ids) for s in outcome.segments if isinstance(s, Context)]


def test_each_row_is_played_by_the_environment_that_it_names_with_its_prompt_tools_and_partner():
    environment = loaded()
    greeted, texts = played(environment, {BY: "Greeter", "name": "Ann"}, "hello")
    assert "be kind to Ann" in texts[0]
    assert "say" not in texts[0].partition("be kind")[0]
    assert (greeted.reward, greeted.stop_reason, greeted.num_turns) == (2.0, "done", 2)
    said = call(json.dumps({"name": "say", "arguments": {"text": "x", "times": 2}}))
    echoed, texts = played(environment, {BY: "EchoAgain", "said": "so"}, said)
    assert '"say"' in texts[0]
    assert "be kind" not in texts[0]
    assert "<|im_start|>tool\nxx<|im_end|>" in texts[1]
    assert echoed.reward == 1.0


def test_an_environment_without_a_partner_ends_with_a_message_and_exceptions_are_answers_where_one_declares_them():
    environment = loaded({"target": f"{HERE}:Alone"}, {"target": f"{HERE}:Refusing"})
    assert played(environment, {BY: "Alone"}, "hello")[0].num_turns == 1
    give = call(json.dumps({"name": "give", "arguments": {"value": 3}}))
    assert "error : no 3" in played(environment, {BY: "Refusing", "name": "Ann"}, give)[1][1]


class Alone:
    def reset(self):
        return None

    def get_reward(self):
        return 0.5


def test_a_mixture_is_saved_with_the_name_of_the_environment_that_plays_where_all_can_be():
    assert not can_be_saved(loaded())
    environment = loaded({"target": f"{HERE}:Greeter"}, {"target": f"{HERE}:Refusing"})
    assert can_be_saved(environment)
    first = environment()
    first.reset(**{BY: "Refusing", "name": "Ann"})
    first.reply("hi")
    state = json.loads(json.dumps(first.save_state()))
    second = environment()
    second.load_state(state)
    assert isinstance(second.played, Refusing)
    assert (second.get_reward(), second.reply("again"), second.explain_reward()) == (1.0, None, "because")
    assert [schema["function"]["name"] for schema in second.tool_schemas] == ["give"]


def test_it_is_played_by_hand_as_each_of_its_environments(tmp_path):
    path = tmp_path / "mixed.toml"
    path.write_text("".join(f'[[env.mixture]]\ntarget = "{HERE}:{name}"\n' for name in ("Greeter", "EchoAgain")))
    written = []
    for index in (0, 1):
        console = Console(file=io.StringIO(), width=200)
        lines = ["bye", "say x"]

        def read(prompt, lines=lines):
            if not lines:
                raise EOFError
            return lines.pop()

        reward = play_by_hand(PlayOptions(target=str(path), index=index), 0, console, read).reward
        written.append((console.file.getvalue(), reward))
    texts = "".join(text for text, _ in written)
    assert "Several environments: Greeter, EchoAgain." in texts
    assert "because" in texts
    assert "tool  x" in texts
    assert sorted(reward for _, reward in written) == [1.0, 2.0]


def test_rows_are_checked_against_the_environment_that_they_name():
    environment = loaded()
    assert row_misfit(environment, {BY: "Greeter", "name": "Ann"}) == ""
    assert "'name'" in row_misfit(environment, {BY: "Greeter", "said": "Ann"})
    assert "one of Greeter, EchoAgain" in row_misfit(environment, {"name": "Ann"})


def test_every_block_of_rows_has_the_weights_shares_and_each_environments_rows_follow_each_other():
    _, rows = load_tasks(mixed())
    names = [rows.train(i)[BY] for i in range(300)]
    assert Tally(names) == {"Greeter": 200, "EchoAgain": 100}
    assert all(Tally(names[i : i + 3]) == {"Greeter": 2, "EchoAgain": 1} for i in range(0, 300, 3))
    assert len({tuple(names[i : i + 3]) for i in range(0, 300, 3)}) == 3, "in an order of their own"
    greeted = [row["name"] for row in map(rows.train, range(300)) if row[BY] == "Greeter"]
    assert greeted == [f"train{5_000_000 + i}" for i in range(200)]
    again = load_tasks(mixed())[1]
    assert [again.train(i) for i in reversed(range(30))] == [rows.train(i) for i in reversed(range(30))]
    assert [load_tasks(override(mixed(), ["--seed", "6"]))[1].train(i)[BY] for i in range(300)] != names


def test_held_out_rows_are_shared_out_by_weight():
    rows = load_tasks(mixed())[1]
    assert [(row[BY], row.get("name", row.get("said"))) for row in rows.heldout(7)] == [
        *[("Greeter", "heldout0"), ("EchoAgain", "heldout0"), ("Greeter", "heldout1"), ("Greeter", "heldout2")],
        *[("EchoAgain", "heldout1"), ("Greeter", "heldout3"), ("Greeter", "heldout4")],
    ]
    assert all(rows.heldout(num) == rows.heldout(7)[:num] for num in range(7))

    class Few:
        def heldout(self, num):
            return [{"index": i} for i in range(min(num, 2))]

    few = MixtureDataset({str(i): MixedRows(rows=Few(), weight=weight) for i, weight in enumerate((9, 1))}, seed=0)
    assert [(row[BY], row["index"]) for row in few.heldout(20)] == [("0", 0), ("0", 1), ("1", 0), ("1", 1)]
    assert load_tasks(mixed())[1].heldout(0) == []


@pytest.mark.parametrize(
    ("weights", "block"), [((1, 1), 2), ((0.5, 0.25), 3), ((3, 1), 4), ((0.1, 0.9), 10), ((1e-9, 1), 1001)]
)
def test_weights_are_shares_and_none_is_lost(weights, block):
    class Rows:
        def train(self, index):
            return {"index": index}

    rows = MixtureDataset({str(i): MixedRows(rows=Rows(), weight=weight) for i, weight in enumerate(weights)}, seed=0)
    names = Tally(rows.train(i)[BY] for i in range(block))
    assert set(names) == {"0", "1"}
    if weights[0] > 0.001:
        assert names["0"] / names["1"] == pytest.approx(weights[0] / weights[1])


def test_a_row_that_has_the_key_of_the_mixture_itself_is_refused():
    class Rows:
        def train(self, index):
            return {BY: "chess"}

    with pytest.raises(ConfigError, match=r"a row of the mixture has the key environment.*a: \{'environment': 'chess'\}"):
        MixtureDataset({"a": MixedRows(rows=Rows(), weight=1.0)}, seed=0).train(0)


def test_a_mixture_that_cannot_be_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="same name"):
        named_parts(mixed(PARTS[0], PARTS[0]).env.mixture)
    assert list(named_parts(mixed(PARTS[0], {**PARTS[0], "name": "other"}).env.mixture)) == ["Greeter", "other"]
    with pytest.raises(ConfigError, match=r"takes the place of env\.target"):
        check(mixed(target="desk_long"), needs_model=False)
    with pytest.raises(ConfigError, match=r"env\.mixture\[0\]\.train_data names no file"):
        check(mixed({**PARTS[0], "train_data": "nowhere.jsonl"}), needs_model=False)
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"name": "x", BY: "y"}) + "\n")
    with pytest.raises(ConfigError, match=r"does not fit Greeter\.reset"):
        load_tasks(mixed({**PARTS[0], "train_data": str(path)}, PARTS[1]))[1].train(0)
    with pytest.raises(ConfigError, match="knows only the words"):
        load_tasks(config_from_table({"env": {"mixture": PARTS}, "model": {"path": "tiny"}}))
    both = [{"target": "desk"}, {"target": "desk_long"}]
    environment, _ = load_tasks(config_from_table({"env": {"mixture": both}, "model": {"path": "tiny"}}))
    assert list(players_of(environment)) == ["desk", "desk_long"]


@pytest.mark.slow
def test_a_run_of_a_mixture_trains_on_groups_of_each(tiny_folder, tmp_path):
    words = [{"target": "tests.runs:Words", "name": "some"}, {"target": "tests.runs:Words", "name": "others", "weight": 3}]
    config = recipe(tiny_folder, num_updates=2, env={"mixture": words, "target": "desk"})
    assert run(config, tmp_path / "run").error is None
    assert summary_of(tmp_path / "run")["num_updates"] == 2
    assert summary_of(tmp_path / "run")["accounting"]["failed"] == 0


@pytest.mark.slow
def test_held_out_episodes_are_told_apart_by_environment_wherever_a_run_tells_of_them(tiny_folder, tmp_path):
    words = [{"target": "tests.runs:Words", "name": "low"}, {"target": f"{HERE}:Silent", "name": "never"}]
    config = recipe(tiny_folder, num_updates=1, env={"mixture": words, "target": "desk"}, eval={"num_episodes": 6})
    console = Console(file=io.StringIO(), width=100)
    result = run(config, tmp_path / "run", console=console)
    evaluated = [e for e in read_events(tmp_path / "run" / "events.jsonl") if isinstance(e, Evaluated)]
    assert {e.environments for e in map(tupled, evaluated)} == {("low", "never") * 3}
    last = next(e for e in reversed(evaluated) if (e.stage, e.mode) == ("after", "sampled"))
    low = [reward for name, reward in zip(last.environments, last.rewards, strict=True) if name == "low"]
    found = result.summary.environments
    assert list(found) == ["low", "never"]
    assert found["low"].after.reward == mean_interval(low)
    assert (found["never"].before.success.mean, found["never"].after.num_played) == (0.0, 3)
    greedy = next(e for e in reversed(evaluated) if (e.stage, e.mode) == ("after", "greedy"))
    assert result.summary.greedy_reward_after == reward_of(greedy)
    shown = console.file.getvalue()
    assert f"  low: {by_environment(last)['low']}" in shown
    print_summary(result.summary, tmp_path, console=(panel := Console(file=io.StringIO(), width=200)))
    assert f"  never: {found['never'].before} -> {found['never'].after}" in panel.file.getvalue()
    assert f"low, after</th><td>{found['low'].after}" in (tmp_path / "run" / "report.html").read_text()


def tupled(evaluated):
    return replace(evaluated, environments=tuple(evaluated.environments))


class Silent(Words):
    """Is worth nothing."""

    def get_reward(self):
        return 0.0


@pytest.mark.slow
def test_an_evaluation_of_a_mixture_is_by_environment_by_itself(tiny_folder, tmp_path, capsys):
    words = [{"target": "tests.runs:Words", "name": "low"}, {"target": f"{HERE}:Silent", "name": "never"}]
    config = recipe(tiny_folder, env={"mixture": words, "target": "desk"}, eval={"num_episodes": 4})
    written = write_recipe(tmp_path / "mixed.toml", config)
    assert command(["eval", str(tiny_folder), str(written), "--out", str(tmp_path / "out")]) == 0
    assert {name: one.num_played for name, one in read_summary(tmp_path / "out").subsets.items()} == {"low": 2, "never": 2}


class Taught(Words):
    """Has demonstrations of its own."""

    orders: ClassVar[list] = []

    @classmethod
    def warm_start(cls, order):
        order.progress(order.steps, order.steps, 1.0)
        cls.orders.append((order.environment.__name__, Path(order.folder).name))
        return Path(f"{order.folder}-{cls.__name__}")


class TaughtToo(Taught):
    """Another one."""


def test_a_warm_start_of_a_mixture_takes_one_environment_after_another_and_needs_demonstrations_of_all(tmp_path):
    parts = [{"target": f"{HERE}:Taught"}, {"target": f"{HERE}:TaughtToo"}]
    config = config_from_table({"env": {"mixture": parts}, "model": {"path": str(tmp_path), "warm_start_steps": 3}})
    environment, _ = load_tasks(config)
    start = prepare_model(config, environment, lambda note: None)
    assert Taught.orders == [("Taught", tmp_path.name), ("TaughtToo", f"{tmp_path.name}-Taught")]
    assert (start.model.name, start.steps) == (f"{tmp_path.name}-Taught-TaughtToo", 6)
    other = [*parts, {"target": "tests.runs:Words"}]
    for path in (str(tmp_path), "smollm2"):
        with pytest.raises(ConfigError, match=r"the environment Words has no demonstrations.*a table of env\.mixture"):
            load_tasks(config_from_table({"env": {"mixture": other}, "model": {"path": path, "warm_start_steps": 3}}))


@pytest.mark.slow
def test_a_starting_model_of_one_environment_is_made_for_a_mixture_of_its_kinds(tmp_path, monkeypatch):
    monkeypatch.setenv("OLDLOGITS_CACHE", str(tmp_path))
    both = [{"target": "desk"}, {"target": "desk_long"}]
    config = config_from_table({"env": {"mixture": both}, "model": {"path": "tiny", "warm_start_steps": 1}})
    environment, _ = load_tasks(config)
    start = prepare_model(config, environment, lambda note: None)
    assert (start.model / "config.json").is_file()
    assert start.steps == 2
