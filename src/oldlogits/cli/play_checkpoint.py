"""A trained agent as a player: token in, token out, under the parser and the limits that it was trained with."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from oldlogits.cli.player import EndedEarlyError, Role
from oldlogits.config import check_model_folder, config_from_table
from oldlogits.config.schema import EnvConfig
from oldlogits.core.engine import EngineSpec, Sampling
from oldlogits.core.environment import Environment
from oldlogits.core.errors import ConfigError
from oldlogits.core.parser import PARSERS, Malformed, ToolCall
from oldlogits.engines.embedded.engine import EngineCore
from oldlogits.engines.embedded.model_folder import read_config
from oldlogits.envs.base import system_prompt_of
from oldlogits.envs.tools import tool_schemas
from oldlogits.models.chat import ChatFormat
from oldlogits.models.load import load_tokenizer
from oldlogits.record.folder import RunFolder

LONGEST: Final = 4096
"""The most tokens of an episode that a model folder without a recipe plays, unless the model takes fewer."""


class CheckpointPlayer:
    """A model that plays one episode.

    Args:
        model: A Hugging Face folder.
        environment_class: The environment, whose tools it is told of.
        env: Parser and limits.
        temperature: The temperature of the sampler; 0: greedy.
        seed: The seed of the sampler.
    """

    def __init__(
        self, model: Path, environment_class: type[Environment], env: EnvConfig, *, temperature: float, seed: int
    ) -> None:
        self._class, self._env, self._parser = environment_class, env, PARSERS.find(env.parser)()
        self._chat = ChatFormat(load_tokenizer(model), tool_schemas(environment_class), system_prompt_of(environment_class))
        spec = EngineSpec(model_path=str(model), max_num_seqs=1, max_context=env.max_episode_tokens, seed=seed)
        self._core = EngineCore(spec)
        stop_ids = self._chat.stop_ids
        self._sampling = Sampling(max_tokens=env.max_tokens_per_turn, temperature=temperature, stop_token_ids=stop_ids)
        self._ids: list[int] = []
        self._num_turns = 0

    @classmethod
    def open(
        cls, path: Path | None, environment_class: type[Environment], env: EnvConfig | None, *, greedy: bool, seed: int
    ) -> CheckpointPlayer:
        """Open a model folder, or the latest checkpoint of a run folder, which plays by its own recipe.

        Raises:
            ConfigError: There is no path, or the run folder has no checkpoint.
            ModelFolderError: The path is neither.
        """
        if path is None:
            allowed = "a run folder or a model folder"
            raise ConfigError("mode 'checkpoint' needs a model", got="no --model", allowed=allowed, fix="add --model runs/...")
        run, model = RunFolder(path=path), path
        if run.config.is_file():
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
        else:
            check_model_folder(path)
            env = env or EnvConfig(max_episode_tokens=min(LONGEST, read_config(path).max_positions))
        return cls(model, environment_class, env, temperature=0.0 if greedy else 1.0, seed=seed)

    def write(self, role: Role, seen: str) -> tuple[str, Sequence[ToolCall | Malformed]]:
        """Read what the environment says, and sample the next turn.

        Raises:
            EndedEarlyError: A limit ends the episode.
        """
        read = self._chat.continuation_ids(role, seen) if self._ids else self._chat.prompt_ids(seen)
        room = self._env.max_episode_tokens - len(self._ids) - len(read)
        if room <= 0 or self._num_turns == self._env.max_turns:
            raise EndedEarlyError("max_tokens" if room <= 0 else "max_turns")
        self._ids += read
        self._num_turns += 1
        max_tokens = min(room, self._env.max_tokens_per_turn)
        self._core.add(f"play/{self._num_turns}", self._ids, replace(self._sampling, max_tokens=max_tokens))
        while not (finished := self._core.step()):
            pass
        [(_, generation)] = finished
        ids = generation.output_ids
        self._ids += ids
        text = self._chat.decode(ids)
        if not ids or ids[-1] not in self._chat.stop_ids:
            raise EndedEarlyError("turn_too_long" if room > len(ids) else "max_tokens", text)
        return text, self._parser.parse(text)
