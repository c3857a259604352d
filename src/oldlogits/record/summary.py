"""The summary of a run, computed from its events alone: of a run that is finished, resumed, interrupted, crashed or running.

Each number is measured where its event is emitted; here it is only added up, over the events of the line of history that
counts (`record.event_log.history`).
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final, Literal, Self, get_args

from oldlogits.core.trajectory import is_success
from oldlogits.record.bus import EventKind
from oldlogits.record.event_log import RecordedEvent, history, read_events
from oldlogits.record.folder import RunFolder, write_atomic
from oldlogits.record.intervals import Interval, paired_gain
from oldlogits.record.jsonl import Json, RecordError, encode, number

Ended = Literal["done", "interrupted", "error"]

ACCOUNTS: Final = ("submitted", "trained", "filtered", "failed", "cancelled", "queued", "running")
"""Trajectories by what became of them; the first is the sum of the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What came out of a run; None means that it was not measured. docs/run-folder.md says what each field means."""

    success_before: Interval | None
    success_after: Interval | None
    greedy_before: Interval | None
    greedy_after: Interval | None
    gain: Interval | None
    num_updates: int
    num_trajectories: int
    num_multi_version_trajectories: int
    staleness_mean: float | None
    staleness_max: int | None
    provenance: Mapping[str, int]
    consistency_publish_max_abs_error: float | None
    consistency_lag0_max_abs_error: float | None
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

    def write(self, path: Path) -> None:
        """Write ``summary.json`` atomically; non-finite numbers become strings."""
        plain = json.loads(encode(asdict(self)))
        write_atomic(path, json.dumps(plain, indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read ``summary.json``.

        Raises:
            RecordError: Its keys are not those of a summary.
        """
        found = json.loads(path.read_text(encoding="utf-8"), object_hook=_revive)
        names = {field.name for field in fields(cls)}
        if not isinstance(found, dict) or found.keys() != names:
            raise RecordError(
                f"{path.name} is no summary",
                got=", ".join(sorted(found)) if isinstance(found, dict) else type(found).__name__,
                allowed=", ".join(sorted(names)),
                fix="read the folder with the version of oldlogits that wrote it",
            )
        return cls(**found)


def _revive(found: dict[str, Any]) -> dict[str, Any] | Interval:
    """Undo `encode`: "inf" back to a number, a table with an interval's keys back to an `Interval`."""
    revived: dict[str, Any] = {key: float(value) if value in ("nan", "inf", "-inf") else value for key, value in found.items()}
    return Interval(**revived) if revived.keys() == {field.name for field in fields(Interval)} else revived


def summarise(events: Iterable[RecordedEvent]) -> Summary:
    """Add up the events of a run, whole or not: all of its file, in order."""
    found = _Events(history(events))
    started, metrics = found.last(EventKind.RUN_STARTED), found.metrics
    tokens = [sum(counts.values()) for counts in found.counts("staleness_counts")]
    lags = {int(lag): num for lag, num in sum(found.counts("staleness_counts"), Counter()).items()}
    num_tokens, wall = sum(tokens), [m.get("time/update_s", 0.0) for m in metrics]
    sizes = [m.get("ratio/log_r_d_abs_mean", 0.0) * num for m, num in zip(metrics, tokens, strict=True)]
    stored = found.later_versions()
    stored_bytes, num_stored = sum(found.numbers(stored, "version_bytes")), len(stored)
    full_bytes, num_trained = sum(found.numbers(stored, "full_bytes")), number(started.get("num_trained")) or 0.0
    scored, sent, down = (found.of[kind] for kind in (EventKind.SCORED, EventKind.WEIGHTS_UPDATED, EventKind.SERVER_DOWN))
    num_patches = sum(event.fields.get("sent") == "patch" for event in sent)
    probe = found.of[EventKind.PROBE]
    return Summary(
        success_before=found.rate("before", "sampled"),
        success_after=found.rate("after", "sampled"),
        greedy_before=found.rate("before", "greedy"),
        greedy_after=found.rate("after", "greedy"),
        gain=_gain(found.rewards("before"), found.rewards("after")),
        num_updates=len(metrics),
        num_trajectories=round(sum(m.get("episode/num", 0.0) for m in metrics)),
        num_multi_version_trajectories=round(
            sum(m.get("episode/multi_version", 0.0) * m.get("episode/num", 0.0) for m in metrics)
        ),
        staleness_mean=_ratio(sum(lag * num for lag, num in lags.items()), num_tokens),
        staleness_max=max(lags, default=None),
        provenance=dict(sum(found.counts("provenance"), Counter())),
        consistency_publish_max_abs_error=_worst(found.numbers(probe, "consistency_publish_max_abs_error")),
        consistency_lag0_max_abs_error=_worst(found.numbers(probe, "consistency_lag0_max_abs_error")),
        probe_max_abs_error=_worst(found.numbers(probe, "max_abs_error")),
        log_r_d_mean_abs=_ratio(sum(sizes), num_tokens),
        log_r_d_max_abs=_worst(m["ratio/log_r_d_abs_max"] for m in metrics if "ratio/log_r_d_abs_max" in m),
        rho_mean=_ratio(sum(m.get("mask/rho", 0.0) for m in metrics), len(metrics)),
        num_dropped_nonfinite=round(sum(m.get("mask/num_nonfinite", 0.0) for m in metrics)),
        version_bytes_mean=_ratio(stored_bytes, num_stored),
        version_share_of_copy=_ratio(stored_bytes, full_bytes),
        version_share_of_average=_ratio(stored_bytes, num_stored * 4 * num_trained),
        switch_mean_s=_ratio(sum(found.numbers(scored, "switch_s")), sum(found.numbers(scored, "num_checkouts"))),
        sync_bytes_mean=_ratio(sum(found.numbers(sent, "bytes")), len(sent)),
        num_patch_syncs=num_patches,
        num_full_syncs=len(sent) - num_patches,
        num_refused_patches=sum(bool(event.fields.get("refused")) for event in sent),
        trainer_copies_max=_worst(m["copies/trainer"] for m in metrics if "copies/trainer" in m),
        engine_copies_max=_whole(_worst(m["copies/engine"] for m in metrics if "copies/engine" in m)),
        num_servers_down=sum(event.fields.get("is_failure", True) is True for event in down),
        num_lost_tokens=round(sum(found.numbers(down, "num_lost_tokens"))),
        train_wall_s=sum(wall),
        engine_idle_share=_ratio(_product(wall, metrics, "idle/engine_share"), sum(wall)),
        trainer_idle_share=_ratio(_product(wall, metrics, "idle/trainer_share"), sum(wall)),
        runtime=str(started.get("runtime", "")),
        variant=str(started.get("variant", "")),
        source=str(started.get("source", "")),
        seed=int(number(started.get("seed")) or 0),
        ended=found.ended,
        accounting=found.accounting(),
    )


def summarise_folder(folder: RunFolder) -> Summary:
    """The summary of a run folder."""
    return summarise(read_events(folder.events))


class _Events:
    """The events that count, by kind, and the questions that a summary asks of them."""

    def __init__(self, events: Sequence[RecordedEvent]) -> None:
        self.of: Mapping[EventKind, list[RecordedEvent]] = defaultdict(list)
        for event in events:
            self.of[event.kind].append(event)
        self.metrics = [_numbers(event.fields.get("metrics")) for event in self.of[EventKind.UPDATE]]
        end = events[-1] if events and events[-1].kind is EventKind.RUN_ENDED else None
        self._end = end.fields if end else {}
        reason = self._end.get("reason")
        self.ended: Ended | None = next((known for known in get_args(Ended) if known == reason), None)

    def last(self, kind: EventKind) -> Mapping[str, Json]:
        """The fields of the last event of a kind; empty where there is none."""
        return self.of[kind][-1].fields if self.of[kind] else {}

    def numbers(self, events: Iterable[RecordedEvent], name: str) -> list[float]:
        """A field of some events, where it is a number."""
        return [value for event in events if (value := number(event.fields.get(name))) is not None]

    def counts(self, name: str) -> list[Counter[str]]:
        """A field of the updates that counts tokens by something."""
        found = (_numbers(event.fields.get(name)) for event in self.of[EventKind.UPDATE])
        return [Counter({key: round(value) for key, value in counts.items()}) for counts in found]

    def later_versions(self) -> list[RecordedEvent]:
        """The versions that the store keeps as a difference: not the first after each start, which is the resident copy."""
        starts = [event.seq for event in self.of[EventKind.RUN_STARTED]]
        published = self.of[EventKind.PUBLISHED]
        first = {min((e.seq for e in published if e.seq > start), default=-1) for start in starts}
        return [event for event in published if event.seq not in first and event.fields.get("full_bytes")]

    def rate(self, stage: str, mode: str) -> Interval | None:
        """The success rate of the last evaluation of a stage."""
        played = self._evaluation(stage, mode)
        mean, low, high, num = (number(played.get(name)) for name in ("mean", "low", "high", "num_episodes"))
        if mean is None or low is None or high is None:
            return None
        return Interval(mean=mean, low=low, high=high, num_episodes=int(num or 0))

    def rewards(self, stage: str) -> list[float]:
        """The rewards of the last sampled evaluation of a stage; empty where none was recorded."""
        rewards = self._evaluation(stage, "sampled").get("rewards")
        return [number(reward) or 0.0 for reward in rewards] if isinstance(rewards, list) else []

    def _evaluation(self, stage: str, mode: str) -> Mapping[str, Json]:
        played = [e.fields for e in self.of[EventKind.EVALUATION] if (e.fields["stage"], e.fields["mode"]) == (stage, mode)]
        return played[-1] if played else {}

    def accounting(self) -> Mapping[str, int]:
        """What became of the trajectories, as the end of the run counted it.

        Where nobody could count at the end, the last update's account stands, and what was outstanding then was cancelled; of a
        run without a recorded end it is still queued or running.
        """
        counted = _numbers(self._end.get("accounting"))
        if counted:
            return {name: round(counted.get(name, 0.0)) for name in ACCOUNTS}
        last = self.metrics[-1] if self.metrics else {}
        found = {name: round(last.get(f"accounting/{name}", last.get(f"queue/{name}", 0.0))) for name in ACCOUNTS}
        if self.ended is not None:
            done = found["trained"] + found["filtered"] + found["failed"]
            found |= {"cancelled": found["submitted"] - done, "queued": 0, "running": 0}
        return found


def _gain(before: Sequence[float], after: Sequence[float]) -> Interval | None:
    """The gain over the episodes that both evaluations played: a resumed run may evaluate more rows, or fewer."""
    num = min(len(before), len(after))
    successes = ([float(is_success(reward)) for reward in rewards[:num]] for rewards in (before, after))
    return paired_gain(*successes) if num else None


def _numbers(value: Json) -> dict[str, float]:
    items: Iterator[tuple[str, Json]] = iter(value.items() if isinstance(value, Mapping) else ())
    return {name: found for name, raw in items if (found := number(raw)) is not None}


def _product(weights: Sequence[float], metrics: Sequence[Mapping[str, float]], name: str) -> float:
    return sum(weight * found.get(name, 0.0) for weight, found in zip(weights, metrics, strict=True))


def _ratio(total: float, count: float) -> float | None:
    return total / count if count else None


def _worst(values: Iterable[float]) -> float | None:
    """The greatest value; NaN counts as absent."""
    return max((value for value in values if not math.isnan(value)), default=None)


def _whole(value: float | None) -> int | None:
    return None if value is None else round(value)
