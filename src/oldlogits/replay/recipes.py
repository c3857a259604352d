"""The recipes of a replay: the recorded one, and what overrides make of it. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Final

from oldlogits.config.check import check, resolve
from oldlogits.config.episodes import EnvConfig
from oldlogits.config.load import config_from_table, known_keys, override, read_toml
from oldlogits.config.schema import RunConfig
from oldlogits.core.errors import ConfigError, ReplayError
from oldlogits.record.folder import RunFolder

AVERAGE: Final = ("proximal.decay", "proximal.beta", "proximal.reset", "proximal.reset_below")
RECORDED: Final = ("objective.advantage", "objective.branch_weight")
"""Keys whose outcome stands in the record."""
SHARED: Final = ("model.path", "model.routing", "trainer.device", "trainer.num_threads")
"""Keys that say where the run's own model is, what it follows, and where it is computed: a change holds for both recipes."""
REPLAYED: Final = tuple(
    key
    for key in known_keys()
    if key in ("variant", "band", "proximal.source", "model.forward_dtype", *AVERAGE)
    or (key.startswith(("objective.", "trainer.")) and key not in (*RECORDED, *SHARED))
)
"""Keys that a replay may change."""
_NOT_ASKED: Final = 2**62
"""Updates that nobody asks for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipes:
    """The recipe that batches were recorded under, and the one that they are trained under again.

    Args:
        recorded: The recorded recipe; a neutral table has none, and this is the same as `replayed`.
        replayed: The recipe of the replay.
        num_updates: The updates that are asked for; None: all that are recorded.
    """

    recorded: RunConfig
    replayed: RunConfig
    num_updates: int | None

    @property
    def changes(self) -> Mapping[str, tuple[object, object]]:
        """The keys that differ, each with its recorded and its replayed value."""
        return differing(self.recorded, self.replayed)


def differing(one: RunConfig, other: RunConfig) -> dict[str, tuple[object, object]]:
    """Compare two recipes key by key."""
    pairs = {key: (attrgetter(key)(one), attrgetter(key)(other)) for key in known_keys()}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def recipes_of_run(folder: RunFolder, overrides: Sequence[str]) -> Recipes:
    """Read the recipe of a run folder, and apply overrides to it.

    Where they name another variant and no source, the first source that fits the variant is taken.

    Raises:
        ConfigError: A key says how tokens are sampled, or the recipe cannot be run as written.
        ReplayError: The run has followed its engine's routing, which is not recorded.
    """
    recorded = config_from_table(read_toml(folder.config))
    asked, num_updates = _overridden(recorded, overrides)
    model = replace(recorded.model, path=asked.model.path, routing=asked.model.routing)
    trainer = replace(recorded.trainer, device=asked.trainer.device, num_threads=asked.trainer.num_threads)
    recorded = replace(recorded, model=model, trainer=trainer)
    if recorded.model.routing != "off":
        raise ReplayError(
            "the run has recorded which experts its engine chose, and token tables do not hold them",
            got=f"model.routing = '{recorded.model.routing}'",
            allowed="'off': the trainer chooses the experts itself, which gives other log-probs than the run had",
            fix="pass --model.routing off",
        )
    _check(asked)
    return Recipes(recorded=recorded, replayed=asked, num_updates=num_updates)


def recipes_of_table(overrides: Sequence[str], *, num_updates: int, max_staleness: int, longest: int) -> Recipes:
    """Make the recipe of a neutral table: the defaults, in one optimizer step an update, and overrides.

    Args:
        overrides: Such as ``--variant decoupled_async``.
        num_updates: Its updates.
        max_staleness: The largest staleness of its tokens.
        longest: The tokens of its longest trajectory.

    Raises:
        ConfigError: A key says how tokens are sampled, or the recipe cannot be run as written.
    """
    base = RunConfig(num_updates=num_updates, max_staleness=max_staleness, env=EnvConfig(max_episode_tokens=longest))
    base = replace(base, trainer=replace(base.trainer, minibatches_per_update=1))
    asked, num_asked = _overridden(base, overrides)
    _check(asked)
    return Recipes(recorded=asked, replayed=asked, num_updates=num_asked)


def _overridden(config: RunConfig, overrides: Sequence[str]) -> tuple[RunConfig, int | None]:
    """Apply overrides; give the updates that they ask for apart, for the schedule stays that of all.

    Raises:
        ConfigError: A key says how tokens are sampled.
    """
    words, base = [word.partition("=")[0] for word in overrides], replace(config, num_updates=_NOT_ASKED)
    if "--variant" in words and "--proximal.source" not in words:
        base = replace(base, proximal=replace(base.proximal, source="auto"))
    asked = resolve(override(base, overrides))
    num_updates = None if asked.num_updates == _NOT_ASKED else asked.num_updates
    asked = replace(asked, num_updates=config.num_updates)
    if idle := [key for key in differing(config, asked) if key not in (*REPLAYED, *SHARED)]:
        raise ConfigError(
            "a replay samples nothing, so that these keys would have no effect",
            got=", ".join(idle),
            allowed="num_updates, " + ", ".join((*REPLAYED, *SHARED)),
            fix=f"remove {idle[0]}, or train a run with it",
        )
    return asked, num_updates


def _check(config: RunConfig) -> None:
    """Refuse a recipe as `train` does, but for its environment, which is not played."""
    check(replace(config, env=EnvConfig()))
