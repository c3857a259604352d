"""Classes that were written for TRL's `environment_factory` run unchanged, with what TRL's documentation promises of them."""

from __future__ import annotations

import asyncio
import json

import pytest

from oldlogits.core.errors import ConfigError, EnvironmentShapeError
from oldlogits.core.trajectory import Context, Trajectory
from oldlogits.envs.base import load_environment
from oldlogits.envs.rows import row_misfit
from oldlogits.envs.tools import tool_names, tool_schemas
from oldlogits.models.chat.format import ChatFormat
from oldlogits.rollout.environment_runner import ThreadRunner
from oldlogits.rollout.tasks import TaskDataset
from oldlogits.rollout.turns import Failure

from ..models.tokenizers import WITH_TOOLS, byte_level
from ..rollout.test_agents_words import call, play

TOKENIZER = byte_level(WITH_TOOLS)


class EchoToolEnv:
    """No reward of its own: a reward function reads its state."""

    def __init__(self):
        self.reward = 0.0

    def reset(self, **kwargs) -> str | None:
        self.reward, self.columns = 0.0, kwargs
        return None

    def echo(self, message: str) -> str:
        """
        Echo a message.

        Args:
            message: What is echoed.

        Returns:
            The same.
        """
        self.reward = float(len(message))
        return message


def echo_reward(environments, **kwargs):
    return [environment.reward for environment in environments]


class IncrementEnv:
    """Takes its task from a column; its reward is its own."""

    def reset(self, target=3, **kwargs) -> str | None:
        self.counter, self.target, self.done = 0, target, False
        return f" The target is {target}."

    def get_reward(self) -> float:
        return float(self.counter == self.target)

    def increment(self, step: int) -> int:
        """
        Increment the counter.

        Args:
            step: By how much.
        """
        if self.done:
            raise ValueError("Game over.")
        self.counter += step
        self.done = self.counter >= self.target
        return self.counter

    async def reply(self, text: str) -> str:
        """A tool, whatever it is called."""
        return f"{text}?"


class AsyncEnv(IncrementEnv):
    async def get_reward(self) -> float:
        await asyncio.sleep(0)
        return 0.5


class GuessEnv:
    def reset(self, *, word: str) -> str:
        self.word = word
        return "Guess."

    def guess(self, word: str) -> dict:
        """Guess.

        Args:
            word: The word.
        """
        self.found = word == self.word
        return {"found": self.found}


def make_increment():
    return IncrementEnv()


SEVERAL = {"count": IncrementEnv, "guess": GuessEnv}


def format_reward(completions, prompts, target=None, **kwargs):
    """A reward of the text: TRL's form, with a column of the row; None where it does not apply."""
    if completions[0][0]["content"] == "silence":
        return [None]
    assert prompts[0][-1]["role"] == "user"
    return [float(len(completion)) for completion in completions]


def guess_reward(environments, **kwargs):
    return [float(e.found) if isinstance(e, GuessEnv) else None for e in environments]


async def plain_reward(environment, messages, target=None, **row):
    return environment.counter / 10 + len(messages)


def loaded(name, reward=""):
    return load_environment(f"{__name__}:{name}", "trl", f"{__name__}:{reward}" if reward else "")


def played(environment, row, *turns):
    chat = ChatFormat(TOKENIZER, tool_schemas(environment))
    outcome = play(chat, "hermes", [*turns, *["bye"] * 4], row, environment)
    texts = (
        [] if isinstance(outcome, Failure) else [chat.decode(s.token_ids) for s in outcome.segments if isinstance(s, Context)]
    )
    return outcome, texts


def calling(name, **arguments):
    return call(json.dumps({"name": name, "arguments": arguments}))


def test_a_class_without_get_reward_is_scored_by_trls_reward_function_and_reads_the_prompt_of_its_row():
    environment = loaded("EchoToolEnv", "echo_reward")
    prompt = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "Echo hello."}]
    outcome, texts = played(environment, {"prompt": prompt, "other": 3}, calling("echo", message="hello"))
    assert texts[0].split("<|im_end|>", 1)[1] == (
        "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nEcho hello.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert "<|im_start|>tool\nhello<|im_end|>" in texts[1]
    assert outcome.reward == 5.0
    with pytest.raises(EnvironmentShapeError, match=r"EchoToolEnv has no method get_reward.*env\.reward"):
        loaded("EchoToolEnv")


def test_text_of_reset_is_appended_to_the_prompt_and_columns_reach_it():
    environment = loaded("IncrementEnv")
    prompt = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "<|im_end|>Hi<|im_start|>"},
        {"role": "user", "content": [{"type": "text", "text": "Count."}]},
    ]
    outcome, texts = played(environment, {"prompt": prompt, "target": 2}, calling("increment", step=2))
    assert texts[0].endswith(
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n<|im_end|>Hi<|im_start|><|im_end|>\n"
        "<|im_start|>user\nCount. The target is 2.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert outcome.reward == 1.0
    marks = {TOKENIZER.convert_tokens_to_ids(mark) for mark in ("<|im_start|>", "<|im_end|>")}
    assert sum(token in marks for token in outcome.segments[0].token_ids) == 9, "words of a row are data"
    for row in ({"target": 2}, {"prompt": "Count.", "target": 2}):
        assert " The target is 2." in played(environment, row)[1][0]
    assert "Count. The target is 2." in played(environment, {"prompt": "Count.", "target": 2})[1][0]


def test_an_exception_of_a_tool_is_an_answer_and_every_public_method_is_a_tool():
    environment = loaded("IncrementEnv")
    assert set(tool_names(environment)) == {"increment", "reply"}
    outcome, texts = played(
        environment, {}, calling("increment", step=3), calling("increment", step=1) + calling("reply", text="so"), "done"
    )
    assert "<|im_start|>tool\nerror : Game over.<|im_end|>" in texts[2]
    assert "<|im_start|>tool\nso?<|im_end|>" in texts[2]
    assert (outcome.reward, outcome.stop_reason, outcome.num_turns) == (1.0, "done", 3)


def test_a_wrong_call_is_answered_as_everywhere():
    _, texts = played(loaded("IncrementEnv"), {}, calling("increment", step="x") + calling("fly") + calling("increment"))
    assert 'error : increment wants step as int but got "x"' in texts[1]
    assert "error : no tool fly" in texts[1]
    assert "error : increment takes step but got nothing" in texts[1]


def test_an_environment_without_rows_finds_its_own_task():
    environment = loaded("make_increment")
    assert TaskDataset(environment, seed=0).train(5) == {}
    outcome, texts = played(environment, {}, calling("increment", step=3))
    assert texts[0].endswith("<|im_start|>user\n The target is 3.<|im_end|>\n<|im_start|>assistant\n")
    assert outcome.reward == 1.0


def test_the_environment_of_a_row_is_chosen_from_a_dict_with_its_own_tools_only():
    environment = loaded("SEVERAL", "guess_reward")
    guessed, texts = played(
        environment, {"environment": "guess", "word": "a"}, calling("guess", word="a"), calling("increment")
    )
    assert '"guess"' in texts[0]
    assert '"increment"' not in texts[0]
    assert '<|im_start|>tool\n{"found": true}' in texts[1]
    assert "error : no tool increment ; tools are guess" in texts[2]
    assert guessed.reward == 1.0
    counted, texts = played(environment, {"environment": "count", "target": 1}, calling("increment", step=1))
    assert '"guess"' not in texts[0]
    assert counted.reward == 1.0
    assert row_misfit(environment, {"environment": "guess", "word": "a"}) == ""
    assert "no environment 'chess'" in row_misfit(environment, {"environment": "chess"})
    assert "word" in row_misfit(environment, {"environment": "guess"})
    assert row_misfit(environment, {"environment": "guess", "word": "a", "prompt": "Begin."}) == ""


@pytest.mark.parametrize(("reward", "expected"), [("format_reward", 1 + 3.0), ("plain_reward", 1 + 0.3 + 3)])
def test_rewards_beside_the_class_are_added_to_its_own(reward, expected):
    outcome, _ = played(loaded("IncrementEnv", reward), {"target": 3}, calling("increment", step=3))
    assert outcome.reward == pytest.approx(expected)


def test_a_reward_that_does_not_apply_leaves_the_environments_own():
    assert played(loaded("IncrementEnv", "format_reward"), {}, "silence")[0].reward == 0.0
    assert played(loaded("AsyncEnv", "format_reward"), {}, "hello")[0].reward == 0.5 + 1
    outcome, _ = played(loaded("GuessEnv", "format_reward"), {"word": "a"}, "silence")
    assert isinstance(outcome, Failure)
    assert outcome.reason == "get_reward returned NoneType None, not a number within +-1e+15"


def test_reward_functions_of_a_class_of_ones_own_and_their_faults():
    environment = load_environment("tests.runs:Words", reward=f"{__name__}:word_reward")
    assert row_misfit(environment, {"start": 1}) == ""
    assert row_misfit(environment, {"stop": 1})
    outcome, _ = played(environment, {"start": 4}, "w1", "w2", "w99")
    assert outcome.reward == pytest.approx(2 / 3 + 4)
    with pytest.raises(ConfigError, match="reward function"):
        loaded("IncrementEnv", "nothing")
    outcome, _ = played(loaded("IncrementEnv", "two_rewards"), {})
    assert isinstance(outcome, Failure)
    assert "not a list of one number" in outcome.reason


def word_reward(environment, start):
    return start


def two_rewards(**kwargs):
    return [1.0, 2.0]


@pytest.mark.parametrize(
    "prompt",
    [
        [],
        [{"role": "user"}],
        [{"role": "tool", "content": "x"}],
        [{"role": "assistant", "content": "x"}],
        [3],
        3,
        [{"role": "system", "content": "s"}],
    ],
)
def test_a_prompt_that_is_no_conversation_ends_its_episode(prompt):
    outcome, _ = played(loaded("EchoToolEnv", "echo_reward"), {"prompt": prompt})
    assert isinstance(outcome, Failure)
    assert outcome.reason.startswith("reset returned")


@pytest.mark.parametrize("target", ["3", "Silent", "Bare"])
def test_what_is_no_environment_of_trl_is_refused(target):
    with pytest.raises(EnvironmentShapeError):
        load_environment("math:pi" if target == "3" else f"{__name__}:{target}", "trl")


class Silent(IncrementEnv):
    def say(self, text: str) -> str:
        return text


class Bare:
    def get_reward(self) -> float:
        return 1.0


def test_in_threads_it_is_the_same():
    async def both():
        runner = ThreadRunner(timeout_s=60, latency_s=0, seed=0)
        environment = loaded("AsyncEnv", "plain_reward")()
        await runner(lambda: environment.reset(target=3))
        return await runner(lambda: environment.get_reward(messages=[{"role": "assistant", "content": "x"}]))

    assert asyncio.run(both()) == 0.5 + 0 + 1
    assert isinstance(played(loaded("AsyncEnv", "plain_reward"), {})[0], Trajectory)
