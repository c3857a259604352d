"""Environments of `verifiers` from 0.4 on, as they are installed: the adapter "verifiers", by the key `env.verifiers`.

    taskset --> rows of both splits;  a row --> Task --> Env.run_episode, whose model is the run --> the reward of its traces

`env.verifiers_args` are the fields of the environment's own config, and two more: "select" says which tasks are played, as its
`SelectConfig` does, and "eval" has the "taskset" and "select" of held-out tasks; without it every fifth task is held out.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from functools import cache
from statistics import fmean
from typing import TYPE_CHECKING, ClassVar, Final, cast

from oldlogits.core.environment import Environment, JsonValue, Program, Row, Split
from oldlogits.core.errors import ConfigError, reading
from oldlogits.core.registry import require

if TYPE_CHECKING:
    from verifiers.v1 import AgentConfig, Env, Episode, Task

_MODEL: Final = "policy"
_HELD_OUT: Final = 5
"""One task of so many is held out, where the recipe does not say which."""
_KEYS: Final = 'JSON text of an object: fields of its config, "select", and "eval" with "taskset" and "select"'


class EpisodeError(Exception):
    """An episode of verifiers ended with errors, or what it sampled cannot be trained."""


class VerifiersTasks:
    """The tasks of an environment of verifiers, and the program that plays them; the adapter makes a subclass for each."""

    rows: ClassVar[Mapping[Split, list[Row]]]
    program: ClassVar[Program]

    def reset(self, *, task: JsonValue, split: str = "train") -> str:
        """Refuse to be played turn by turn."""
        raise NotImplementedError("an environment of verifiers is played by its program")

    def get_reward(self) -> float:
        """Refuse to be played turn by turn."""
        raise NotImplementedError("an environment of verifiers is played by its program")


@cache
def adapt(words: str) -> type[Environment]:
    """Load an environment and its tasks.

    Args:
        words: JSON of its "id", its "args", and the "max_turns" of an agent for which it says nothing else.

    Raises:
        ConfigError: verifiers is not installed, the environment does not exist, or it does not take the arguments.
    """
    require("verifiers", "verifiers", what="env.verifiers")
    said = json.loads(words)
    got, fix = f"env.verifiers = '{said['id']}', env.verifiers_args = {said['args']!r:.200}", "correct them, or install it"
    with reading(ConfigError, "an environment of verifiers cannot be loaded", got=got, allowed=_KEYS, fix=fix):
        args = json.loads(said["args"] or "{}")
        heldout, select = args.pop("eval", None), args.pop("select", {})
        env = _environment(said["id"], args, said["max_turns"])
        rows = _rows(env, select, "train")
        of_eval, heldout_rows = env, [{**row, "split": "heldout"} for row in rows[_HELD_OUT - 1 :: _HELD_OUT]]
        if heldout is None:
            rows = [row for i, row in enumerate(rows, start=1) if i % _HELD_OUT]
        else:
            others = {**args, "taskset": {**args.get("taskset", {}), **heldout.get("taskset", {})}}
            of_eval = _environment(said["id"], others, said["max_turns"])
            heldout_rows = _rows(of_eval, heldout.get("select", select), "heldout")
    parts = {"train": rows, "heldout": heldout_rows}
    body = {"rows": parts, "program": VerifiersProgram({"train": env, "heldout": of_eval})}
    return cast("type[Environment]", type(said["id"], (VerifiersTasks,), body))


class VerifiersProgram:
    """Plays episodes of an environment while it is `serving`.

    Args:
        environments: The environment of each split; it may be one.
    """

    def __init__(self, environments: Mapping[str, Env]) -> None:
        self._environments = environments

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Hold what all episodes share: its own servers, and what stands between its agents and the model."""
        async with AsyncExitStack() as stack:
            for env in {id(env): env for env in self._environments.values()}.values():
                await stack.enter_async_context(cast("AbstractAsyncContextManager[None]", env.serving()))
            yield

    async def __call__(self, base_url: str, api_key: str, row: Row) -> float:
        """Play an episode; its reward is the mean of those of all agents that the policy plays.

        Raises:
            EpisodeError: It ended with errors, or the policy plays an agent that is not to be trained.
        """
        from verifiers.v1 import EvalClientConfig, ModelContext
        from verifiers.v1.configs.client import ClientTimeoutConfig

        env = self._environments[str(row.get("split", "train"))]
        variable = f"OLDLOGITS_API_KEY_{secrets.token_hex(8)}"  # its clients read keys from variables
        os.environ[variable] = api_key
        try:
            waits = ClientTimeoutConfig(connect=None)  # it runs on this machine, and an episode has its deadline
            client = EvalClientConfig(base_url=base_url, api_key_var=variable, timeout=waits)
            episode = await env.run_episode(_task(env, row), ModelContext(model=_MODEL, client=client))
        finally:
            del os.environ[variable]
        return _reward(episode, base_url)


def _environment(id: str, args: Mapping[str, JsonValue], max_turns: int) -> Env:
    """Load an environment; agents for which nothing else is said only talk, and run on this machine."""
    from verifiers.v1 import load_environment, resolve_env_config
    from verifiers.v1.configs.agent import agent_config_fields

    taskset = cast("Mapping[str, JsonValue]", args.get("taskset") or {})
    config = resolve_env_config({**args, "taskset": {**taskset, "id": id}})
    agents = {name: _agent(agent, id, max_turns) for name, agent in agent_config_fields(config).items()}
    return load_environment(config.model_copy(update=agents))


def _agent(agent: AgentConfig, id: str, max_turns: int) -> AgentConfig:
    from verifiers.v1 import SubprocessConfig, default_harness_id
    from verifiers.v1.utils.loaders import harness_class, harness_config_type

    update: dict[str, object] = {} if agent.max_turns else {"max_turns": max_turns}
    own = agent.harness.id if agent.harness else default_harness_id(id)
    if agent.harness is None and own == default_harness_id(""):
        own = "null"
        update["harness"] = harness_config_type(own)(id=own)
    program = harness_class(own)
    if "runtime" not in agent.model_fields_set and not program.EXECUTES_CODE and not program.NEEDS_CONTAINER:
        update["runtime"] = SubprocessConfig()
    return agent.model_copy(update=update)


def _rows(env: Env, select: Mapping[str, JsonValue], split: Split) -> list[Row]:
    from verifiers.v1 import SelectConfig

    tasks = env.taskset.select(SelectConfig.model_validate(select))
    if not tasks.bounded:
        raise ValueError('its tasks have no end: say how many, such as "select": {"limit": 1000}')
    return [{"task": task.data.model_dump(mode="json"), "split": split} for task in tasks]


def _task(env: Env, row: Row) -> Task:
    kind = type(env.taskset).task_type()
    return kind(kind.data_type().model_validate(row["task"]), env.config.taskset.task)


def _reward(episode: Episode, base_url: str) -> float:
    errors = [*episode.errors, *(error for trace in episode.traces for error in trace.errors)]
    if errors or not episode.ok:
        raise EpisodeError("; ".join(f"{error.type}: {error.message}" for error in errors) or "it is not ok")
    agents = [(trace, trace.agent) for trace in episode.traces]
    played = [(trace, agent) for trace, agent in agents if agent.config.client and agent.config.client.base_url == base_url]
    if fixed := sorted({agent.name for _, agent in played if not agent.trainable or agent.config.model != _MODEL}):
        names = ", ".join(fixed)
        raise EpisodeError(f"another model plays {names}: give its model and its client in env.verifiers_args")
    if not played:
        raise EpisodeError("no agent of it is played by the policy")
    return fmean(trace.reward for trace, _ in played)
