"""The source of the proximal policy's log-probs: one seam for all of them, and the registry of the built-in ones.

    SOURCES.find("snapshot")(SourceHandles(trainer=trainer))      one way to build a source, from inside and from outside

What differs between sources is an attribute of the class. Recipe checks, cost tables and backends read these attributes
before anything is built; so a module that defines a source should import no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from oldlogits.core.errors import MissingPolicyError
from oldlogits.core.policies import AT_LOSS_TIME, EXPERIMENTAL_VARIANTS, VARIANTS, Policy, find_variant
from oldlogits.core.registry import Registry
from oldlogits.core.scoring import BatchTokens, DedicatedScorer, Scored, ScoringHandle
from oldlogits.core.trajectory import Sampled, Segment, Trajectory
from oldlogits.core.weights import PolicyVersion, WeightUpdate

Keep = Callable[[str, PolicyVersion, NDArray[np.float32]], None]
"""Takes note of the values of all tokens of a trajectory that one version sampled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceHandles:
    """What a source may ask: the trainer, and for a source with `needs_scorer` the second model that only scores.

    A source that scores tokens before their batch enters training tells `keep` of them, for a run that was ended and goes on:
    the trajectory, the version that sampled them, and the values of all its tokens of that version, float32 in token order.
    """

    trainer: ScoringHandle
    scorer: DedicatedScorer | None = None
    keep: Keep = lambda trajectory_id, version, values: None


class LogprobSource(Protocol):
    """A source of log-probs of one policy. The loop pauses the engine; a source only scores.

    A source inherits from this class; hooks that it does not need do nothing. In the order of a run::

        on_segment_closed ... on_arrival -> acquire -> (steps) -> on_paused -> on_published -> ... -> drop
        on_segment_closed ... on_arrival -> on_paused -> acquire -> (steps) -> on_published -> ... -> drop    needs_pause
    """

    provides: ClassVar[Policy]
    """The policy whose log-probs `acquire` returns; MU: it returns none."""
    cost: ClassVar[str] = ""
    """What the source costs, in one phrase."""
    stores_versions: ClassVar[bool] = False
    """Whether the trainer stores versions, so that tokens can be scored at an older one."""
    mixes_versions: ClassVar[bool] = False
    """Whether the source gives OLD of tokens that were sampled over keys and values of older versions."""
    scores_batches: ClassVar[bool] = True
    """Whether it scores tokens when their batch enters training, so that they can be scored in the batch's micro-batches."""
    needs_scorer: ClassVar[bool] = False
    """Whether a second model that only scores is to be opened for the source."""
    keeps_average: ClassVar[bool] = False
    """Whether the trainer keeps an average of its versions for the source."""
    needs_pause: ClassVar[bool] = False
    """Whether the engine is paused from before the first optimizer step until it holds the next version."""
    needs_partials: ClassVar[bool] = False
    """Whether `on_paused` is to be called."""
    _trainer: ScoringHandle
    consistency_max_abs_error: float = math.nan
    """The largest error in nats of checks of exactness that the trainer does not make; NaN: there is none."""

    def __init__(self, handles: SourceHandles) -> None:
        """Keep the handles that the source asks."""
        self._trainer = handles.trainer

    @classmethod
    def most_stored(cls, window: int) -> int:
        """The most versions in the trainer's store at the moment of a publish, where no token's lag exceeds `window`."""
        return window + 2 if cls.stores_versions else 0

    def on_segment_closed(self, trajectory_id: str, segments: Sequence[Segment]) -> None:
        """Take note of all segments so far of a running trajectory that has grown; the sequence goes on growing."""
        return

    def on_withdrawn(self, trajectory_id: str, segments: Sequence[Segment]) -> None:
        """Take note of all segments so far of a trajectory whose running turn was given up, with what was read for it."""
        return

    def restore(
        self,
        trajectory_id: str,
        segments: Sequence[Segment],
        values: Mapping[PolicyVersion, Sequence[float]],
        oldest_held: PolicyVersion,
    ) -> bool:
        """Take over a trajectory of a run that goes on; False: the source cannot give the log-probs of all its tokens.

        Args:
            trajectory_id: The id of the trajectory.
            segments: All that it has, what its running turn had sampled included.
            values: What the source had told `SourceHandles.keep` of it, by version.
            oldest_held: The oldest version that the trainer can score at.
        """
        oldest = min((segment.version for segment in segments if isinstance(segment, Sampled)), default=oldest_held)
        if self.stores_versions and self.oldest_needed(oldest) < oldest_held:
            return False
        self.on_segment_closed(trajectory_id, segments)
        return True

    async def on_arrival(self, trajectories: Sequence[Trajectory]) -> None:
        """Take note that the trajectories of a group have ended and wait for training."""
        return

    async def on_paused(self, running: Mapping[str, Sequence[Sampled]]) -> None:
        """Take note that the engine is paused: what the unfinished turns have sampled so far, by trajectory."""
        return

    async def on_published(self, version: PolicyVersion, update: WeightUpdate, probe_logps: NDArray[np.float32]) -> None:
        """Take note that the engine holds `version` and samples again.

        Args:
            version: The number of the version.
            update: The trainer's weights, valid until its next optimizer step, or the patches that lead to them.
            probe_logps: float32 [probe token]; what the weights give the fixed probe tokens.
        """
        return

    async def acquire(self, batch: BatchTokens) -> Scored | None:
        """Return the log-probs of the batch that enters training; None from a source for variants that need none."""

    def drop(self, trajectory_ids: Iterable[str]) -> None:
        """Forget these trajectories: they were trained, filtered, failed or cancelled."""
        return

    def oldest_needed(self, in_flight: PolicyVersion) -> PolicyVersion:
        """The oldest version that the source may still ask the trainer's store for; by default that of tokens in flight."""
        return in_flight

    def metrics(self) -> Mapping[str, float]:
        """What this source has done since the last call; docs/metrics.md."""
        return {}

    async def close(self) -> None:
        """End with the run: leave nothing running."""
        return


SOURCES: Final = Registry[type[LogprobSource]](
    "source",
    key="proximal.source",
    builtin={
        "snapshot": "oldlogits.sources.snapshot:SnapshotSource",
        "dedicated": "oldlogits.sources.dedicated:DedicatedSource",
        "interruption": "oldlogits.sources.interruption:InterruptionSource",
        "eager": "oldlogits.sources.eager:EagerSource",
        "arrival": "oldlogits.sources.arrival:ArrivalSource",
        "ewma": "oldlogits.sources.ewma:EwmaSource",
        "aged": "oldlogits.sources.aged:AgedSource",
        "rescore": "oldlogits.sources.rescore:RescoreSource",
        "balance": "oldlogits.sources.balance:BalanceSource",
        "none": "oldlogits.sources.none:NoSource",
    },
    needs=("provides", "acquire"),
)
"""The built-in sources by name; a recipe may name any other one as "package.module:Class". Interpolations need none."""


def provided(source: type[LogprobSource]) -> frozenset[Policy]:
    """The policies that a source provides: one, or none where it scores nothing."""
    return frozenset({source.provides}) - AT_LOSS_TIME


def sources_for(variant_name: str) -> list[str]:
    """The built-in sources that provide what a variant needs, and nothing else."""
    needs = find_variant(variant_name).needs
    return [name for name in SOURCES.names if provided(SOURCES.find(name)) == needs]


def check_source(variant_name: str, source_name: str) -> None:
    """Refuse a variant whose proximal policy the source does not provide, with a `MissingPolicyError`."""
    variant, provides = find_variant(variant_name), provided(SOURCES.find(source_name))
    if variant.needs <= provides:
        return

    def named(policies: frozenset[Policy]) -> str:
        return ", ".join(sorted(p.name for p in policies)) or "nothing"

    fitting_sources = sources_for(variant_name)
    rows = {**EXPERIMENTAL_VARIANTS, **VARIANTS}
    fitting_variants = [name for name, row in rows.items() if row.needs and row.needs <= provides]
    remedies = [f"source '{name}'" for name in fitting_sources[:1]] + [f"variant '{name}'" for name in fitting_variants[-1:]]
    raise MissingPolicyError(
        f"variant '{variant_name}' needs log-probs of {named(variant.needs)}, "
        f"but source '{source_name}' provides {named(provides)}",
        got=f"variant = '{variant_name}', proximal.source = '{source_name}'",
        allowed=f"a source that provides {named(variant.needs)}: {', '.join(fitting_sources) or 'none is built in'}",
        fix="use " + (", or ".join(remedies) or "another variant"),
    )
