"""A trained agent plays one episode, through the turn loop that it was trained in, and is watched.

run folder | model folder -> engine in this process -> run_episode -> what is said, as it is said
"""

from __future__ import annotations

import asyncio
import tomllib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar, cast

from oldlogits.config import config_from_table
from oldlogits.config.check import check_model_folder
from oldlogits.config.schema import EnvConfig
from oldlogits.core.engine import Generation, Sampling
from oldlogits.core.engine_spec import EngineSpec
from oldlogits.core.errors import ConfigError
from oldlogits.engines.embedded.engine import EngineCore
from oldlogits.engines.embedded.model_folder import read_config
from oldlogits.engines.embedded.stepwise import EmbeddedEngine
from oldlogits.envs.shape import PARSERS, Environment, Malformed, Parsed, Row, bind, render_result
from oldlogits.models.chat import ChatFormat
from oldlogits.models.load import load_tokenizer
from oldlogits.record.folder import RunFolder
from oldlogits.rollout.environment_runner import run_inline
from oldlogits.rollout.turns import Agent, Failure, TurnLimits, run_episode

T = TypeVar("T")

LONGEST: Final = 4096
"""Tokens of an episode that a model folder without a recipe plays, unless the model takes fewer."""

Say = Callable[[str, str], None]
"""Shows who said what: "agent", "tool" or "customer", and the text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Player:
    """A model and how it plays.

    Args:
        model: A Hugging Face folder.
        env: Parser and limits; the target is not looked at.
        temperature: 0: greedy.
        seed: Of the sampler.
    """

    model: Path
    env: EnvConfig
    temperature: float
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """How an episode ended: the environment, if it could be started, and why the episode stopped."""

    environment: Environment | None
    stop_reason: str


def find_player(path: Path, *, greedy: bool, seed: int) -> Player:
    """The agent of a model folder, or of the latest checkpoint in a run folder with the parser and limits of its recipe.

    Raises:
        ConfigError: The run folder has no checkpoint.
        ModelFolderError: It is neither.
    """
    run = RunFolder(path=path)
    if not run.config.is_file():
        check_model_folder(path)
        model, env = path, EnvConfig(max_episode_tokens=min(LONGEST, read_config(path).max_positions))
    else:
        env = config_from_table(tomllib.loads(run.config.read_text(encoding="utf-8"))).env
        checkpoint = run.latest_checkpoint()
        if checkpoint is None:
            raise ConfigError(
                "the run has no checkpoint yet",
                got=str(path),
                allowed="a run folder with a checkpoint, or a model folder",
                fix="let the run end, or set record.checkpoint_every",
            )
        model = checkpoint / "model"
    return Player(model=model, env=env, temperature=0.0 if greedy else 1.0, seed=seed)


def watch(player: Player, environment_class: type[Environment], row: Row, say: Say) -> Played:
    """Let the agent play one episode."""
    chat = ChatFormat(load_tokenizer(player.model))
    core = EngineCore(
        EngineSpec(model_path=str(player.model), max_num_seqs=1, max_context=player.env.max_episode_tokens, seed=player.seed)
    )
    stage = _Stage(player, say)
    agent = Agent(
        engine=_WatchedEngine(core, lambda ids: say("agent", chat.decode(ids))),
        chat=chat,
        parser=stage.parse,
        limits=TurnLimits(
            max_turns=player.env.max_turns,
            max_tokens_per_turn=player.env.max_tokens_per_turn,
            max_tokens=player.env.max_episode_tokens,
        ),
        sampling=Sampling(max_tokens=player.env.max_tokens_per_turn, temperature=player.temperature),
        run_environment=stage.run,
    )
    outcome = asyncio.run(run_episode(agent, environment_class, row, id="play.0", group_id="play"))
    stop_reason = outcome.reason if isinstance(outcome, Failure) else outcome.stop_reason
    return Played(environment=stage.environment, stop_reason=stop_reason)


class _WatchedEngine(EmbeddedEngine):
    """Samples one request at a time and shows what it sampled."""

    def __init__(self, core: EngineCore, show: Callable[[Sequence[int]], None]) -> None:
        super().__init__(core)
        self._show = show

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, request_id: str, *, quota: int | None = None
    ) -> Generation:
        """Sample a completion, here and now; no quota holds it."""
        self.core.add(request_id, prompt_ids, sampling)
        while not (finished := self.core.step()):
            pass
        [(_, generation)] = finished
        self._show(generation.output_ids)
        return generation


class _Stage:
    """Runs the environment's code as `run_episode` asks for it (class, reset, tools and replies, reward) and shows answers."""

    def __init__(self, player: Player, say: Say) -> None:
        self._parser, self._say = PARSERS[player.env.parser], say
        self._parsed: Parsed = None
        self._is_open = False
        self.environment: Environment | None = None

    def parse(self, text: str) -> Parsed:
        """Read an agent's turn; what is wrong with a call is shown, since no environment code runs for it."""
        self._parsed = self._parser(text)
        if self._parsed is not None and self.environment is not None:
            ready = self._parsed if isinstance(self._parsed, Malformed) else bind(self.environment, self._parsed)
            if isinstance(ready, Malformed):
                self._say("tool", ready.reason)
        return self._parsed

    async def run(self, call: Callable[[], T | Awaitable[T]], *, is_tool: bool = False) -> T:
        """Run environment code; the opening, tool results and replies are shown."""
        result = await run_inline(call)
        if is_tool:
            if result is not None:
                self._say("customer" if self._parsed is None else "tool", render_result(result))
        elif self.environment is None:
            self.environment = cast(Environment, result)
        elif not self._is_open:
            self._is_open = True
            self._say("customer", str(result or ""))
        return result
