"""The summary of a run, computed from its events alone: of a run that is finished, resumed, interrupted, crashed or running.

Each number is measured where its event is emitted; here it is only added up, over the events of the line of history that
counts (`record.event_log.history`).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Literal, Self, TypedDict, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from oldlogits.core.trajectory import is_success
from oldlogits.record.bus import Event
from oldlogits.record.evaluation import Figures, by_environment
from oldlogits.record.event_log import history, read_events, typed
from oldlogits.record.events import (
    BatchScored,
    ConversationRewritten,
    Evaluated,
    Probed,
    RunEnded,
    RunStarted,
    ServerDown,
    TrajectoryFailed,
    TrajectoryRestarted,
    Updated,
    VersionPublished,
    WeightsUpdated,
)
from oldlogits.record.failures import tallied
from oldlogits.record.folder import RunFolder, write_atomic
from oldlogits.record.intervals import Interval, paired_gain, reward_of, success_of
from oldlogits.record.jsonl import RecordError, encode

T = TypeVar("T")
Ended = Literal["done", "interrupted", "error"]

ACCOUNTS: Final = ("submitted", "trained", "filtered", "failed", "cancelled", "queued", "running")
"""Trajectories by what became of them; the first is the sum of the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OfEnvironment:
    """Held-out figures of one environment of a mixture, sampled, before and after training; None: not measured."""

    before: Figures | None
    after: Figures | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What came out of a run; None means that it was not measured. docs/run-folder.md says what each field means."""

    success_before: Interval | None
    success_after: Interval | None
    greedy_before: Interval | None
    greedy_after: Interval | None
    gain: Interval | None
    success_at: float | None
    reward_before: Interval | None
    reward_after: Interval | None
    reward_gain: Interval | None
    greedy_reward_before: Interval | None
    greedy_reward_after: Interval | None
    environments: Mapping[str, OfEnvironment]
    num_updates: int
    num_trajectories: int
    num_multi_version_trajectories: int
    staleness_mean: float | None
    staleness_max: int | None
    provenance: Mapping[str, int]
    consistency_publish_max_abs_error: float | None
    consistency_lag0_max_abs_error: float | None
    consistency_rescored_max_abs_error: float | None
    packing_mean_abs_error: float | None
    packing_max_abs_error: float | None
    num_digests: int
    probe_max_abs_error: float | None
    log_r_d_mean_abs: float | None
    log_r_d_max_abs: float | None
    rho_mean: float | None
    num_dropped_nonfinite: int
    version_bytes_mean: float | None
    version_share_of_copy: float | None
    version_share_of_average: float | None
    switch_mean_s: float | None
    sync_bytes_mean: float | None
    num_patch_syncs: int
    num_full_syncs: int
    num_refused_patches: int
    trainer_copies_max: float | None
    engine_copies_max: int | None
    num_servers_down: int
    num_lost_tokens: int
    train_wall_s: float
    engine_idle_share: float | None
    trainer_idle_share: float | None
    runtime: str
    variant: str
    source: str
    seed: int
    ended: Ended | None
    accounting: Mapping[str, int]
    failures: Mapping[str, int]
    evaluation_failures: Mapping[str, int]
    num_evaluation_episodes: int
    gateway: Mapping[str, int]

    def write(self, path: Path) -> None:
        """Write ``summary.json`` atomically; non-finite numbers become strings."""
        plain = json.loads(encode(asdict(self)))
        write_atomic(path, json.dumps(plain, indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read ``summary.json``.

        Raises:
            RecordError: It is no summary.
        """
        try:
            return TypeAdapter(cls).validate_json(path.read_text(encoding="utf-8"), extra="forbid")
        except ValidationError as error:
            raise RecordError(
                f"{path.name} is no summary",
                got="; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()[:3]),
                allowed="the fields of Summary",
                fix="read the folder with the version of oldlogits that wrote it",
            ) from error


def summarise(events: Iterable[Event]) -> Summary:
    """Add up the events of a run, whole or not: all of its file, in order."""
    kept = history(events)
    started, ends = next(reversed(typed(kept, RunStarted)), None), typed(kept[-1:], RunEnded)
    updates, evaluations, probes = typed(kept, Updated), typed(kept, Evaluated), typed(kept, Probed)
    scored, sent, down, stored = typed(kept, BatchScored), typed(kept, WeightsUpdated), typed(kept, ServerDown), _stored(kept)
    metrics, tokens = [u.metrics for u in updates], [sum(u.staleness_counts.values()) for u in updates]
    lags = sum((Counter(update.staleness_counts) for update in updates), Counter[str]())
    failed, restarted, wall = typed(kept, TrajectoryFailed), typed(kept, TrajectoryRestarted), _of(metrics, "time/update_s")
    return Summary(
        success_before=_last(evaluations, "before", "sampled", success_of),
        success_after=_last(evaluations, "after", "sampled", success_of),
        greedy_before=_last(evaluations, "before", "greedy", success_of),
        greedy_after=_last(evaluations, "after", "greedy", success_of),
        gain=_gain(evaluations, of_success=True),
        success_at=evaluations[-1].success_at if evaluations else None,
        reward_before=_last(evaluations, "before", "sampled", reward_of),
        reward_after=_last(evaluations, "after", "sampled", reward_of),
        reward_gain=_gain(evaluations, of_success=False),
        greedy_reward_before=_last(evaluations, "before", "greedy", reward_of),
        greedy_reward_after=_last(evaluations, "after", "greedy", reward_of),
        environments=_environments(evaluations),
        num_updates=len(updates),
        num_trajectories=round(sum(_of(metrics, "episode/num"))),
        num_multi_version_trajectories=round(_product(metrics, "episode/multi_version", _num_branches(metrics))),
        staleness_mean=_ratio(sum(int(lag) * num for lag, num in lags.items()), lags.total()),
        staleness_max=max(map(int, lags), default=None),
        provenance=dict(sum((Counter(update.provenance) for update in updates), Counter[str]())),
        **_checked(probes),
        log_r_d_mean_abs=_ratio(_product(metrics, "ratio/log_r_d_abs_mean", tokens), lags.total()),
        log_r_d_max_abs=_worst(m["ratio/log_r_d_abs_max"] for m in metrics if "ratio/log_r_d_abs_max" in m),
        rho_mean=_ratio(sum(_of(metrics, "mask/rho")), len(metrics)),
        num_dropped_nonfinite=round(sum(_of(metrics, "mask/num_nonfinite"))),
        version_bytes_mean=_ratio(_num_bytes(stored), len(stored)),
        version_share_of_copy=_ratio(_num_bytes(stored), sum(version.full_bytes for version in stored)),
        version_share_of_average=_ratio(_num_bytes(stored), len(stored) * 4 * (started.num_trained if started else 0)),
        switch_mean_s=_ratio(sum(batch.switch_s for batch in scored), sum(batch.num_checkouts for batch in scored)),
        sync_bytes_mean=_ratio(sum(update.bytes for update in sent), len(sent)),
        num_patch_syncs=(num_patches := sum(update.sent == "patch" for update in sent)),
        num_full_syncs=len(sent) - num_patches,
        num_refused_patches=sum(bool(update.refused) for update in sent),
        trainer_copies_max=_worst(m["copies/trainer"] for m in metrics if "copies/trainer" in m),
        engine_copies_max=_whole(_worst(m["copies/engine"] for m in metrics if "copies/engine" in m)),
        num_servers_down=sum(one.is_failure for one in down),
        num_lost_tokens=sum(one.num_lost_tokens or 0 for one in down) + sum(one.num_lost_tokens for one in restarted),
        train_wall_s=sum(wall),
        engine_idle_share=_ratio(_product(metrics, "idle/engine_share", wall), sum(wall)),
        trainer_idle_share=_ratio(_product(metrics, "idle/trainer_share", wall), sum(wall)),
        runtime=started.runtime if started else "",
        variant=started.variant if started else "",
        source=started.source if started else "",
        seed=started.seed if started else 0,
        ended=cast(Ended, ends[0].reason) if ends else None,
        accounting=_accounting(ends[0] if ends else None, metrics[-1] if metrics else {}),
        failures=tallied(one.reason for one in failed if one.stage == "train"),
        evaluation_failures=tallied(one.reason for one in failed if one.stage != "train"),
        num_evaluation_episodes=sum(len(evaluation.rewards) for evaluation in evaluations),
        gateway=gateway_counts(metrics, typed(kept, ConversationRewritten)),
    )


def summarise_folder(folder: RunFolder) -> Summary:
    """The summary of a run folder."""
    return summarise(read_events(folder.events))


def gateway_counts(metrics: Sequence[Mapping[str, float]], rewritten: Iterable[ConversationRewritten]) -> dict[str, int]:
    """What an agent program asked for, of metrics that each count since the one before; empty where there is none."""
    names = dict.fromkeys(name for one in metrics for name in one if name.startswith("gateway/"))
    counts = {name.removeprefix("gateway/"): round(sum(_of(metrics, name))) for name in names}
    return counts | {f"rewritten_from_{role}": num for role, num in sorted(Counter(one.role for one in rewritten).items())}


def _num_branches(metrics: Sequence[Mapping[str, float]]) -> list[float]:
    return [one.get("episode/num", 0.0) * one.get("episode/branches", 1.0) for one in metrics]


def _stored(events: Iterable[Event]) -> list[VersionPublished]:
    """The versions that the store keeps as a difference: not the first after each start, which is the resident copy."""
    found, is_resident = list[VersionPublished](), False
    for event in events:
        if isinstance(event, RunStarted):
            is_resident = True
        elif isinstance(event, VersionPublished):
            found += [] if is_resident or not event.full_bytes else [event]
            is_resident = False
    return found


def _num_bytes(stored: Iterable[VersionPublished]) -> int:
    return sum(version.version_bytes for version in stored)


def _last(evaluations: Sequence[Evaluated], stage: str, mode: str, of: Callable[[Evaluated], T]) -> T | None:
    """What the last evaluation of a stage says; None also where none of its episodes could be played."""
    last = next((e for e in reversed(evaluations) if (e.stage, e.mode) == (stage, mode)), None)
    return of(last) if last is not None and last.num_episodes else None


class _Checks(TypedDict):
    consistency_publish_max_abs_error: float | None
    consistency_lag0_max_abs_error: float | None
    consistency_rescored_max_abs_error: float | None
    packing_mean_abs_error: float | None
    packing_max_abs_error: float | None
    probe_max_abs_error: float | None
    num_digests: int


def _checked(probes: Sequence[Probed]) -> _Checks:
    """The worst of what the checks of exactness found."""
    return {
        "consistency_publish_max_abs_error": _worst(probe.consistency_publish_max_abs_error for probe in probes),
        "consistency_lag0_max_abs_error": _worst(probe.consistency_lag0_max_abs_error for probe in probes),
        "consistency_rescored_max_abs_error": _worst(probe.consistency_rescored_max_abs_error for probe in probes),
        "packing_mean_abs_error": _worst(probe.packing_mean_abs_error for probe in probes),
        "packing_max_abs_error": _worst(probe.packing_max_abs_error for probe in probes),
        "probe_max_abs_error": _worst(probe.max_abs_error for probe in probes),
        "num_digests": max((probe.num_digests for probe in probes), default=0),
    }


def _environments(evaluations: Sequence[Evaluated]) -> dict[str, OfEnvironment]:
    before, after = (_last(evaluations, stage, "sampled", by_environment) or {} for stage in ("before", "after"))
    return {name: OfEnvironment(before=before.get(name), after=after.get(name)) for name in sorted({*before, *after})}


def _accounting(end: RunEnded | None, metrics: Mapping[str, float]) -> Mapping[str, int]:
    """What became of the trajectories, as the end of the run counted it.

    Where nobody could count at the end, the last update's account stands, and what was outstanding then was cancelled; of a
    run without a recorded end it is still queued or running.
    """
    if end is not None and end.accounting:
        return {name: end.accounting.get(name, 0) for name in ACCOUNTS}
    found = {name: round(metrics.get(f"accounting/{name}", metrics.get(f"queue/{name}", 0.0))) for name in ACCOUNTS}
    if end is not None:
        done = found["trained"] + found["filtered"] + found["failed"]
        found |= {"cancelled": found["submitted"] - done, "queued": 0, "running": 0}
    return found


def _gain(evaluations: Sequence[Evaluated], *, of_success: bool) -> Interval | None:
    """The gain over the episodes that both evaluations played: a resumed run may evaluate more rows, or fewer."""
    before, after = (_last(evaluations, stage, "sampled", lambda e: e) for stage in ("before", "after"))
    if before is None or after is None:
        return None
    rewards = zip(before.rewards, after.rewards, strict=False)
    pairs = [(first, last) for first, last in rewards if first is not None and last is not None]
    if of_success:
        pairs = [(float(is_success(a, after.success_at)), float(is_success(b, after.success_at))) for a, b in pairs]
    return paired_gain([first for first, _ in pairs], [last for _, last in pairs]) if pairs else None


def _of(metrics: Sequence[Mapping[str, float]], name: str) -> list[float]:
    """A metric of each update; 0 where it has none."""
    return [found.get(name, 0.0) for found in metrics]


def _product(metrics: Sequence[Mapping[str, float]], name: str, weights: Sequence[float]) -> float:
    return sum(value * weight for value, weight in zip(_of(metrics, name), weights, strict=True))


def _ratio(total: float, count: float) -> float | None:
    return total / count if count else None


def _worst(values: Iterable[float]) -> float | None:
    """The greatest value; NaN counts as absent."""
    return max((value for value in values if not math.isnan(value)), default=None)


def _whole(value: float | None) -> int | None:
    return None if value is None else round(value)
