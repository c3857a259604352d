"""What is told of an update that the objective does not know: batch, queue, engine and trainer; docs/metrics.md."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict

from oldlogits.core.engine_stats import EngineCapabilities, EngineStats
from oldlogits.core.scoring import Scored
from oldlogits.core.trajectory import TrajectoryGroup, is_success
from oldlogits.core.weights import PolicyVersion
from oldlogits.record.events import BatchScored, BatchTaken, Updated, VersionPublished
from oldlogits.rollout.buffer import Buffer
from oldlogits.train.reports import PublishedVersion, ScoringWork, TrainerState
from oldlogits.train.step import UpdateResult


class UpdateTimer:
    """Times the parts of an update; `last_ended` is when the update before ended.

    Example:
        >>> now = iter([0.0, 1.0, 3.0, 4.0])
        >>> timer = UpdateTimer(lambda: next(now))
        >>> with timer.part("step"):
        ...     pass
        >>> timer.end()
        {'time/step_s': 2.0, 'time/between_s': 0.0, 'time/update_s': 4.0}
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter, last_ended: float | None = None) -> None:
        self._clock, self._started = clock, clock()
        self._between_s = self._started - (self._started if last_ended is None else last_ended)
        self._parts_s: dict[str, float] = {}
        self.ended = self._started

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time what is done inside as ``time/{name}_s``."""
        started = self._clock()
        yield
        self._parts_s[f"time/{name}_s"] = self._clock() - started

    def seconds(self, name: str) -> float:
        """The seconds of a part that is over."""
        return self._parts_s[f"time/{name}_s"]

    def since_part(self, name: str) -> float:
        """Seconds since the update began, without one of its parts."""
        return self._clock() - self._started - self.seconds(name)

    def end(self) -> dict[str, float]:
        """The seconds of all parts, of the whole update, and since the end of the one before."""
        self.ended = self._clock()
        return {**self._parts_s, "time/between_s": self._between_s, "time/update_s": self.ended - self._started}


def counters(engine: EngineStats, trainer: TrainerState) -> dict[str, float]:
    """What engine and trainer have counted since they started; differences of two are the metrics of what lies between."""
    return {
        "engine/sampled_tokens": engine.num_decode_tokens,
        "engine/busy_s": engine.busy_s,
        "trainer/busy_s": trainer.busy_s,
        "engine/requests": engine.num_requests,
        "engine/found_tokens": engine.num_prefix_hit_tokens,
        "engine/waiting_s": engine.waiting_s,
        **engine.decode.metrics("engine/decode"),
        **engine.prefill.metrics("engine/prefill"),
    }


def usage_metrics(before: Mapping[str, float], after: Mapping[str, float], wall_s: float) -> dict[str, float]:
    """What engine and trainer did in an update, from the counters at its start and its end, `wall_s` seconds later."""
    used = {name: value - before[name] for name, value in after.items()}
    sampled, engine_s, trainer_s = (used.pop(name) for name in ("engine/sampled_tokens", "engine/busy_s", "trainer/busy_s"))
    while_busy = {"throughput/engine_busy_tokens_per_s": sampled / engine_s} if engine_s > 0 and sampled else {}
    return {
        "throughput/engine_tokens_per_s": sampled / wall_s,
        **while_busy,
        **used,
        "idle/engine_share": max(0.0, 1 - engine_s / wall_s),
        "idle/trainer_share": max(0.0, 1 - trainer_s / wall_s),
    }


def batch_metrics(
    groups: Sequence[TrajectoryGroup], lags: Mapping[int, int], wall_s: float, *, success_at: float
) -> dict[str, float]:
    """What was trained.

    Args:
        groups: The groups of the batch.
        lags: Its loss tokens by staleness.
        wall_s: The seconds of the update.
        success_at: The reward from which an episode counts as a success.
    """
    trajectories = [t for group in groups for t in group.trajectories]
    rewards = [[branches[0].reward for branches in group.episodes] for group in groups]
    num, num_loss_tokens = sum(map(len, rewards)), sum(lags.values())
    return {
        "reward/mean": sum(map(sum, rewards)) / num,
        "reward/success": sum(is_success(reward, success_at) for group in rewards for reward in group) / num,
        "reward/uniform_groups": sum(len(set(group)) == 1 for group in rewards) / len(groups),
        "episode/num": num,
        "episode/branches": len(trajectories) / num,
        "episode/turns": sum(t.num_turns for t in trajectories) / num,
        "episode/sampled_tokens": num_loss_tokens / num,
        "episode/multi_version": sum(len(t.versions) > 1 for t in trajectories) / len(trajectories),
        "staleness/mean": sum(lag * n for lag, n in lags.items()) / num_loss_tokens,
        "staleness/max": max(lags),
        "throughput/trainer_tokens_per_s": sum(t.num_tokens for t in trajectories) / wall_s,
    }


def queue_metrics(buffer: Buffer) -> dict[str, float]:
    """What is in flight, and what became of all trajectories so far."""
    return {
        "queue/running": buffer.running,
        "queue/queued": buffer.queued,
        "queue/admission_open": float(buffer.num_admissible() > 0),
        **{f"accounting/{name}": num for name, num in asdict(buffer.account).items()},
    }


def batch_taken(groups: Sequence[TrajectoryGroup], version: PolicyVersion, waited_s: float) -> BatchTaken:
    """The event of a batch that is trained at a version, after so long a wait."""
    return BatchTaken(
        version=version,
        groups=[group.id for group in groups],
        num_tokens=sum(t.num_tokens for group in groups for t in group.trajectories),
        staleness_max=version - min(group.oldest_version for group in groups),
        waited_s=waited_s,
    )


def batch_scored(
    version: PolicyVersion, scored: Scored, versions: Sequence[int], work: ScoringWork, seconds_s: float
) -> BatchScored:
    """The event of a batch whose tokens, of some versions, got their proximal policy's log-probs."""
    return BatchScored(
        version=version,
        policy=scored.policy.value,
        num_switches=scored.num_switches,
        versions=list(versions),
        **asdict(work),
        seconds_s=seconds_s,
    )


def updated(
    version: PolicyVersion, result: UpdateResult, metrics: dict[str, float], groups: Sequence[TrajectoryGroup]
) -> Updated:
    """The event of an update that made a version."""
    return Updated(
        version=version,
        metrics=metrics,
        staleness_counts={str(lag): num for lag, num in result.staleness_counts.items()},
        provenance=dict(result.provenance),
        table=result.table,
        trajectories=[t for group in groups for t in group.trajectories],
    )


def version_published(published: PublishedVersion, seconds_s: float) -> VersionPublished:
    """The event of a version that was published, in so many seconds."""
    stored = published.publication
    return VersionPublished(
        version=published.version,
        bytes=published.store_bytes,
        version_bytes=stored.stored_bytes if stored is not None else 0,
        full_bytes=stored.full_bytes if stored is not None else 0,
        changed=stored.share_changed if stored is not None else None,
        store_s=published.store_s,
        seconds_s=seconds_s,
    )


def copies(engine: EngineCapabilities, kept_bytes: float, live_bytes: int) -> dict[str, float]:
    """Copies of what is trained that both sides keep.

    Args:
        engine: What the engine says of its copies.
        kept_bytes: Bytes that the trainer keeps beside the live weights: stored versions and an average.
        live_bytes: Bytes of the live weights that are trained.
    """
    return {"copies/trainer": 1 + kept_bytes / live_bytes, "copies/engine": engine.num_replicas + engine.num_host_copies}
