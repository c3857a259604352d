"""A trained agent as a player: token in, token out, under the parser and the limits that it was trained with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from oldlogits.cli.player import EndedEarlyError, Player, Role
from oldlogits.config import check_model_folder, config_from_table, read_toml
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


def checkpoint_player(
    path: Path | None, environment_class: type[Environment], env: EnvConfig | None, *, greedy: bool, seed: int
) -> Player:
    """Return the agent of a model folder, or of the latest checkpoint of a run folder, which plays by its own recipe.

    Args:
        path: The folder.
        environment_class: The environment, whose tools the model is told of.
        env: Parser and limits of a model folder; None: those of a default recipe, within what the model can read.
        greedy: Whether it takes the likeliest token instead of sampling.
        seed: The seed of the sampler.

    Raises:
        ConfigError: There is no path, or the run folder has no checkpoint.
        ModelFolderError: The path is neither.
    """
    model, env = _opened(path, env)
    tools, system_prompt = tool_schemas(environment_class), system_prompt_of(environment_class)
    chat, parser = ChatFormat(load_tokenizer(model), tools, system_prompt), PARSERS.find(env.parser)()
    core = EngineCore(EngineSpec(model_path=str(model), max_num_seqs=1, max_context=env.max_episode_tokens, seed=seed))
    ids: list[int] = []
    num_turns = 0

    def write(role: Role, seen: str) -> tuple[str, Sequence[ToolCall | Malformed]]:
        """Read what the environment says, and sample the next turn."""
        nonlocal num_turns
        read = chat.continuation_ids(role, seen) if ids else chat.prompt_ids(seen)
        room = env.max_episode_tokens - len(ids) - len(read)
        if room <= 0 or num_turns == env.max_turns:
            raise EndedEarlyError("max_tokens" if room <= 0 else "max_turns")
        ids.extend(read)
        num_turns += 1
        most = min(room, env.max_tokens_per_turn)
        temperature = 0.0 if greedy else 1.0
        sampling = Sampling(max_tokens=most, temperature=temperature, stop_token_ids=chat.stop_ids)
        core.add(f"play/{num_turns}", ids, sampling)
        while not (finished := core.step()):
            pass
        [(_, generation)] = finished
        written = generation.output_ids
        ids.extend(written)
        text = chat.decode(written)
        if not written or written[-1] not in chat.stop_ids:
            raise EndedEarlyError("turn_too_long" if room > len(written) else "max_tokens", text)
        return text, parser.parse(text)

    return write


def _opened(path: Path | None, env: EnvConfig | None) -> tuple[Path, EnvConfig]:
    """Return the model's folder, and the recipe that it plays by."""
    if path is None:
        allowed = "a run folder or a model folder"
        raise ConfigError("mode 'checkpoint' needs a model", got="no --model", allowed=allowed, fix="add --model runs/...")
    run = RunFolder(path=path)
    if not run.config.is_file():
        check_model_folder(path)
        return path, env or EnvConfig(max_episode_tokens=min(LONGEST, read_config(path).max_positions))
    checkpoint = run.latest_checkpoint()
    if checkpoint is None:
        raise ConfigError(
            "the run has no checkpoint yet",
            got=str(path),
            allowed="a run folder with a checkpoint, or a model folder",
            fix="let the run end, or set record.checkpoint_every",
        )
    return checkpoint / "model", config_from_table(read_toml(run.config)).env
