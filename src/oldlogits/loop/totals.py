"""What a run adds up to, update by update: the source of its summary. Serialisable, so that a resumed run goes on."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from oldlogits.config import RunConfig
from oldlogits.core.engine_stats import Incident
from oldlogits.core.weights import StoreReceipt
from oldlogits.record.summary import Ended, Interval, Summary, paired_gain, wilson
from oldlogits.rollout.buffer import Buffer
from oldlogits.rollout.groups import is_success
from oldlogits.train.reports import ConsistencyErrors, ScoringWork
from oldlogits.train.step import UpdateResult


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncResult:
    """What brought the engine a version.

    Args:
        num_bytes: That travelled, those that were refused included.
        is_patch: Whether a patch was enough.
        refused: Why the engine's host could not take a patch; empty: it could, or none was sent.
    """

    num_bytes: int
    is_patch: bool
    refused: str = ""


@dataclass(slots=True, kw_only=True)
class Totals:
    """Sums and extremes over the updates of a run, and the rewards of its evaluations."""

    num_updates: int = 0
    num_trajectories: int = 0
    num_multi_version: int = 0
    staleness_counts: dict[int, int] = field(default_factory=dict)
    provenance: dict[str, int] = field(default_factory=dict)
    num_dropped_nonfinite: int = 0
    log_r_d_abs_sum: float = 0.0
    log_r_d_abs_max: float = math.nan
    rho_sum: float = 0.0
    probe_max_abs_error: float = math.nan
    train_wall_s: float = 0.0
    engine_busy_s: float = 0.0
    trainer_busy_s: float = 0.0
    num_patch_syncs: int = 0
    num_full_syncs: int = 0
    num_refused_patches: int = 0
    num_servers_down: int = 0
    num_lost_tokens: int = 0
    sync_bytes: int = 0
    num_stored: int = 0
    stored_bytes: int = 0
    full_copy_bytes: int = 0
    average_bytes: int = 0
    trainer_copies: float = 0.0
    engine_copies: int = 0
    num_switches: int = 0
    switch_s: float = 0.0
    next_row: int = 0
    unfinished_rows: list[int] = field(default_factory=list)
    account: dict[str, int] = field(default_factory=dict)
    rewards: dict[str, list[float]] = field(default_factory=dict)

    def add_update(self, result: UpdateResult, *, num_trajectories: int, num_multi_version: int) -> None:
        """Count one update."""
        metrics = result.metrics
        num_tokens = sum(result.staleness_counts.values())
        self.num_updates += 1
        self.num_trajectories += num_trajectories
        self.num_multi_version += num_multi_version
        self.staleness_counts = dict(Counter(self.staleness_counts) + Counter(result.staleness_counts))
        self.provenance = dict(Counter(self.provenance) + Counter(result.provenance))
        self.num_dropped_nonfinite += round(metrics["mask/num_nonfinite"])
        if "ratio/log_r_d_abs_mean" in metrics:  # absent where no token of the batch is finite
            self.log_r_d_abs_sum += metrics["ratio/log_r_d_abs_mean"] * num_tokens
            self.log_r_d_abs_max = _worse(self.log_r_d_abs_max, metrics["ratio/log_r_d_abs_max"])
        self.rho_sum += metrics["mask/rho"]

    def add_probe(self, error: float) -> None:
        """Count one probe."""
        self.probe_max_abs_error = _worse(self.probe_max_abs_error, error)

    def add_sync(self, sent: SyncResult) -> None:
        """Count one update of the engine's weights."""
        self.num_patch_syncs += sent.is_patch
        self.num_full_syncs += not sent.is_patch
        self.num_refused_patches += bool(sent.refused)
        self.sync_bytes += sent.num_bytes

    def add_copies(self, trainer: float, engine: int) -> None:
        """Count the copies of the weights that are kept on both sides."""
        self.trainer_copies = max(self.trainer_copies, trainer)
        self.engine_copies = max(self.engine_copies, engine)

    def add_incident(self, incident: Incident) -> None:
        """Count what happened to a server."""
        if incident.what == "down":
            self.num_servers_down += incident.is_failure
            self.num_lost_tokens += incident.num_lost_tokens or 0

    def add_stored(self, publication: StoreReceipt) -> None:
        """Count one version that the store keeps as the difference to the one before."""
        self.num_stored += 1
        self.stored_bytes += publication.stored_bytes
        self.full_copy_bytes = publication.full_bytes

    def add_scoring(self, work: ScoringWork) -> None:
        """Count what the trainer's scoring module did for an update."""
        self.num_switches += work.num_checkouts
        self.switch_s += work.switch_s

    def summary(self, config: RunConfig, buffer: Buffer, consistency: ConsistencyErrors, ended: Ended) -> Summary:
        """The summary of the run so far."""
        num_tokens = sum(self.staleness_counts.values())
        lags = self.staleness_counts
        before, after = self.rewards.get("before/sampled"), self.rewards.get("after/sampled")
        wall_s = self.train_wall_s
        return Summary(
            success_before=_rate(before),
            success_after=_rate(after),
            greedy_before=_rate(self.rewards.get("before/greedy")),
            greedy_after=_rate(self.rewards.get("after/greedy")),
            gain=_gain(before, after) if before and after else None,
            num_updates=self.num_updates,
            num_trajectories=self.num_trajectories,
            num_multi_version_trajectories=self.num_multi_version,
            staleness_mean=sum(lag * n for lag, n in lags.items()) / num_tokens if num_tokens else None,
            staleness_max=max(lags) if lags else None,
            provenance=dict(self.provenance),
            witness_publish_max_abs_error=_known(consistency.publish_max_abs_error),
            witness_lag0_max_abs_error=_known(consistency.lag0_max_abs_error),
            probe_max_abs_error=_known(self.probe_max_abs_error),
            log_r_d_mean_abs=self.log_r_d_abs_sum / num_tokens if num_tokens else None,
            log_r_d_max_abs=_known(self.log_r_d_abs_max),
            rho_mean=self.rho_sum / self.num_updates if self.num_updates else None,
            num_dropped_nonfinite=self.num_dropped_nonfinite,
            version_bytes_mean=_ratio(self.stored_bytes, self.num_stored),
            version_share_of_copy=_ratio(self.stored_bytes, self.num_stored * self.full_copy_bytes),
            version_share_of_average=_ratio(self.stored_bytes, self.num_stored * self.average_bytes),
            switch_mean_s=_ratio(self.switch_s, self.num_switches),
            sync_bytes_mean=_ratio(self.sync_bytes, self.num_patch_syncs + self.num_full_syncs),
            num_patch_syncs=self.num_patch_syncs,
            num_full_syncs=self.num_full_syncs,
            num_refused_patches=self.num_refused_patches,
            trainer_copies_max=self.trainer_copies or None,
            engine_copies_max=self.engine_copies or None,
            num_servers_down=self.num_servers_down,
            num_lost_tokens=self.num_lost_tokens,
            train_wall_s=wall_s,
            engine_idle_share=_idle(self.engine_busy_s, wall_s),
            trainer_idle_share=_idle(self.trainer_busy_s, wall_s),
            runtime=config.runtime.type,
            variant=config.variant,
            source=config.proximal.source,
            seed=config.seed,
            ended=ended,
            accounting={**asdict(buffer.account), "queued": buffer.queued, "running": buffer.running},
        )

    def write(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Totals:
        """Read what `write` wrote."""
        found = json.loads(path.read_text(encoding="utf-8"))
        found["staleness_counts"] = {int(lag): n for lag, n in found["staleness_counts"].items()}
        return cls(**found)


def _worse(a: float, b: float) -> float:
    """The greater of two; NaN counts as absent."""
    return b if math.isnan(a) else a if math.isnan(b) else max(a, b)


def _ratio(total: float, number: float) -> float | None:
    return total / number if number else None


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _successes(rewards: list[float]) -> list[float]:
    return [float(is_success(reward)) for reward in rewards]


def _rate(rewards: list[float] | None) -> Interval | None:
    return wilson(sum(map(is_success, rewards)), len(rewards)) if rewards else None


def _gain(before: list[float], after: list[float]) -> Interval:
    """Over the episodes that both evaluations played: a resumed run may evaluate more rows, or fewer."""
    common = min(len(before), len(after))
    return paired_gain(_successes(before[:common]), _successes(after[:common]))


def _idle(busy_s: float, wall_s: float) -> float | None:
    return min(1.0, max(0.0, 1.0 - busy_s / wall_s)) if wall_s else None
