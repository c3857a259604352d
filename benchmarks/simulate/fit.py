"""Step times and workload of a run folder: what a simulation of that run, or of another recipe, starts from.

Everything is a mean over the run's own updates, the first left out: it does what is done only once.

    update, batch, scored, published, weights_updated events -> seconds    tokens/*.parquet -> turns of each episode
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from benchmarks.simulate.forecast import Forecast
from benchmarks.simulate.scenario import (
    Condition,
    EngineTimes,
    Episode,
    MeasuredWorkload,
    Quantiles,
    Scenario,
    ScorerTimes,
    TrainerTimes,
    Turn,
)
from oldlogits.config.load import load_config
from oldlogits.config.schema import RunConfig
from oldlogits.core.engine_stats import Line
from oldlogits.core.errors import ConfigError
from oldlogits.record.bus import Event
from oldlogits.record.event_log import read_events, typed
from oldlogits.record.events import (
    BatchScored,
    BatchTaken,
    CheckpointWritten,
    Evaluated,
    GroupClosed,
    Probed,
    RunStarted,
    Updated,
    VersionPublished,
    WeightsUpdated,
)
from oldlogits.record.folder import RunFolder
from oldlogits.rollout.turn_latency import KINDS, Kind

SKIP = 1
"""First updates of a run that no mean includes."""

AHEAD = frozenset({"eager", "interruption", "dedicated"})
"""Routes that score before a batch enters training, and count what they do themselves."""


def straight_line(sums: Line) -> tuple[float, float]:
    """The fixed seconds and those for a unit, by least squares, neither below 0; they reproduce the sum of the seconds.

    Example:
        Sizes 1 and 3 that took 2 s and 4 s: a fixed second, and one for each unit.
    """
    if not sums.num or not sums.size:
        return (sums.s / sums.num if sums.num else 0.0), 0.0
    spread = sums.size_sq - sums.size**2 / sums.num
    slope = (sums.size_s - sums.size * sums.s / sums.num) / spread if spread > 1e-9 * sums.size_sq else 0.0
    slope = min(max(0.0, slope), sums.s / sums.size)
    return (sums.s - slope * sums.size) / sums.num, slope


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredRun:
    """A run folder, read.

    Args:
        config: Its recipe.
        updates: The metrics of every update.
        num_tokens: Of every update's batch, context included.
        num_trajectories: Of every update's batch.
        events: All of the run.
        workload: Its episodes and the gaps between their turns.
    """

    config: RunConfig
    updates: Sequence[Mapping[str, float]]
    num_tokens: Sequence[int]
    num_trajectories: Sequence[int]
    events: Sequence[Event]
    workload: MeasuredWorkload

    @classmethod
    def read(cls, path: Path) -> MeasuredRun:
        """Read a run folder of runtime "local".

        Raises:
            ConfigError: It is none, it has too few updates, or was written without what a simulation needs.
        """
        folder = RunFolder(path=path)
        if not folder.events.is_file():
            raise ConfigError(
                "no run folder", got=str(path), allowed="a folder with events.jsonl", fix="oldlogits train RECIPE --out FOLDER"
            )
        config = load_config(path / "config.toml")
        events = list(read_events(folder.events))
        updates, num_starts = [event.metrics for event in typed(events, Updated)], len(typed(events, RunStarted))
        paths = sorted(folder.tokens.glob("v*.parquet"))
        usable = config.runtime.type == "local" and num_starts == 1 and len(updates) >= SKIP + 3
        if not usable or not any(update.get("engine/decode_num") for update in updates[SKIP:]) or not paths:
            raise ConfigError(
                "this run cannot be simulated",
                got=f"runtime {config.runtime.type}, {num_starts} starts, {len(updates)} updates, {len(paths)} token tables",
                allowed=f"runtime local, one start, at least {SKIP + 3} updates with engine/decode_num above 0, a token table",
                fix="train it anew with runtime.type = 'local', engine.type = 'embedded' and record.tokens_every = 1",
            )
        common = 1 + typed(events, Probed)[0].num_tokens  # the system prompt; its first token is given
        return cls(
            config=config,
            updates=updates,
            num_tokens=[event.num_tokens for event in typed(events, BatchTaken)],
            num_trajectories=_trained(updates),
            events=events,
            workload=MeasuredWorkload(groups=_groups(paths), gaps_s=_gaps(updates[SKIP:]), common_tokens=common),
        )

    def total(self, *keys: str) -> float:
        """The sum of metrics over the updates that count; one that an update does not have is 0."""
        return sum(update.get(key, 0.0) for update in self.updates[SKIP:] for key in keys)

    @property
    def num_counted(self) -> int:
        """Updates that count."""
        return len(self.updates) - SKIP

    @property
    def measured(self) -> Forecast:
        """What the run did, as the figures of a forecast; those that its events do not hold are NaN."""
        counted = self.updates[SKIP:]
        wall_s, wait_s = self.total("time/update_s"), self.total("time/wait_batch_s")
        total_s = wall_s + self.total("time/between_s")
        decoded, tokens = self.total("engine/decode_size"), sum(self.num_tokens[SKIP:])
        lags: dict[int, int] = defaultdict(int)
        for event in typed(self.events, Updated)[SKIP:]:
            for lag, num in event.staleness_counts.items():
                lags[int(lag)] += int(num)
        return Forecast(
            trajectories_per_s=sum(self.num_trajectories[SKIP:]) / total_s,
            tokens_per_s=tokens / total_s,
            sampled_per_s=decoded / wall_s,
            engine_idle_share=1 - _busy_s(counted, "engine") / wall_s,
            trainer_idle_share=1 - _busy_s(counted, "trainer") / wall_s,
            scorer_idle_share=math.nan,
            staleness_mean=sum(lag * num for lag, num in lags.items()) / sum(lags.values()),
            staleness_max=max(lags),
            score_share=(self._acquire_s + self._score_after_s) / (wall_s - wait_s),
            stall_s=self.total("time/stall_s") / self.num_counted,
            update_s=wall_s / self.num_counted,
            wait_s=wait_s / self.num_counted,
            reads_per_token=self._num_read / tokens,
            prefill_per_token=self.total("engine/prefill_size") / decoded,
            num_versions=math.nan,
        )

    def scenario(self, config: RunConfig | None = None, *, seed: int = 0) -> Scenario:
        """The run to simulate, from this run's step times.

        Args:
            config: Another recipe, of the same model and environment; None: its own.
            seed: Of what is drawn.

        Raises:
            ConfigError: The other recipe takes a dedicated scorer, whose times this run does not hold.
        """
        c = config or self.config
        n, latency_s = self.num_counted, c.env.latency_s - self.config.env.latency_s
        closed = typed(self.events, GroupClosed)
        return Scenario(
            name=f"{c.proximal.source}, {c.num_updates} updates",
            route=c.proximal.source,
            workload=self.workload if not latency_s else _slower(self.workload, latency_s),
            engine=self.engine_times,
            trainer=self.trainer_times,
            scorer=self._scorer_times(c) if c.proximal.source == "dedicated" else None,
            max_num_seqs=c.engine.max_num_seqs,
            pause_s=_mean(typed(self.events, WeightsUpdated)[SKIP:], "pause_s"),
            load_s=_mean(typed(self.events, WeightsUpdated)[SKIP:], "load_s"),
            group_size=c.rollout.group_size,
            prompts_per_update=c.rollout.prompts_per_update,
            max_running_groups=c.rollout.running_limit,
            max_staleness=c.max_staleness,
            num_updates=c.num_updates,
            skip=SKIP,
            stops=True,
            conditions=self.conditions,
            recompute=c.engine.kv == "recompute",
            found_share=self.total("engine/found_tokens") / self.total("engine/prefill_size", "engine/found_tokens"),
            filtered_share=sum(event.filtered is True for event in closed) / len(closed) if n else 0.0,
            seed=seed,
        )

    @property
    def engine_times(self) -> EngineTimes:
        """Lines through all steps of the updates; what is neither a step nor a wait nor the load is shared by the requests."""
        step_s, sequence_s = straight_line(self._line("decode"))
        wave_s, prefill_s = straight_line(self._line("prefill"))
        wall_s, busy_s = self.total("time/update_s"), _busy_s(self.updates[SKIP:], "engine")
        load_s = _sum(typed(self.events, WeightsUpdated)[1 + SKIP :], "load_s")
        message_s = max(0.0, wall_s - busy_s - self.total("engine/waiting_s") - load_s)
        return EngineTimes(
            step_s=step_s,
            sequence_s=sequence_s,
            wave_s=wave_s,
            prefill_s=prefill_s,
            message_s=message_s / self.total("engine/requests"),
        )

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """Of each update: its own seconds a token, and the engine's busy seconds for what it did, against those of all.

        An engine that had next to nothing to do tells nothing: it counts as slow as the trainer.
        """
        counted, tokens, times = self.updates[SKIP:], self.num_tokens[SKIP:], self.engine_times
        own_s = np.array([update["time/update_s"] - update["time/wait_batch_s"] for update in counted])
        trainer = own_s / tokens * (sum(tokens) / own_s.sum())
        usual_s, did_s = np.array([_engine_seconds(update, times) for update in counted]).T
        is_known = usual_s > 0.1 * np.median(usual_s)
        engine = np.where(is_known, did_s / np.where(is_known, usual_s, 1.0), trainer)
        return tuple(Condition(trainer=float(t), engine=float(e)) for t, e in zip(trainer, engine, strict=True))

    def _line(self, name: str) -> Line:
        return Line(**{field.name: self.total(f"engine/{name}_{field.name}") for field in fields(Line)})

    @property
    def trainer_times(self) -> TrainerTimes:
        """Means over the updates."""
        n, num_tokens = self.num_counted, sum(self.num_tokens[SKIP:])
        read_s, checkout_s = self._score_times
        token_s = self.total("time/step_s") / num_tokens
        named = ("time/wait_batch_s", "time/score_s", "time/step_s", "time/publish_s")
        rest_s = self.total("time/update_s") - sum(map(self.total, named)) + self.total("time/score_s") - self._acquire_s
        if self._route == "interruption":  # the pause precedes the scores
            rest_s -= _sum(typed(self.events, WeightsUpdated)[1 + SKIP :], "pause_s")
        publish_s = _mean(typed(self.events, VersionPublished)[1 + SKIP :], "seconds_s")  # the first is that of version 0
        updated = typed(self.events, WeightsUpdated)[1 + SKIP :]
        given_s = publish_s + _mean(updated, "pause_s") + _mean(updated, "load_s")
        own_s = self.total("time/update_s") - self.total("time/wait_batch_s")
        busy_s = _busy_s(self.updates[SKIP:], "trainer") - self._trainer_scores_s
        first = self.updates[0]
        usual_s = own_s / num_tokens * self.num_tokens[0]
        return TrainerTimes(
            read_s=read_s,
            checkout_s=checkout_s,
            token_s=token_s,
            rest_s=max(0.0, rest_s / n),
            publish_s=publish_s,
            after_s=max(0.0, (self.total("time/publish_s") - self._score_after_s) / n - given_s),
            between_s=self._between_s,
            first_s=max(0.0, first["time/update_s"] - first["time/wait_batch_s"] - usual_s),
            busy_share=min(1.0, busy_s / (own_s - self._acquire_s - self._score_after_s)),
        )

    @property
    def _between_s(self) -> float:
        """Without evaluations and checkpoints: the mean where the run has none between updates, else the median."""
        others = [*typed(self.events, CheckpointWritten), *typed(self.events, Evaluated)]
        has_others = any(0 < event.version < len(self.updates) for event in others)
        between_s = [update["time/between_s"] for update in self.updates[SKIP:]]
        return float(np.median(between_s) if has_others else np.mean(between_s))

    @property
    def _route(self) -> str:
        return self.config.proximal.source

    @property
    def _num_read(self) -> float:
        if self._route in AHEAD:
            return self.total("source/read_tokens")
        return _sum(typed(self.events, BatchScored)[SKIP:], "read_tokens")

    @property
    def _score_after_s(self) -> float:
        """Seconds of waits for the route after the publish."""
        return max(0.0, self.total("source/wait_s") - self._acquire_s) if self._route == "eager" else 0.0

    @property
    def _trainer_scores_s(self) -> float:
        """Seconds that the trainer has scored."""
        if self._route in AHEAD:
            return 0.0 if self._route == "dedicated" else self.total("source/score_s")
        return _sum(typed(self.events, BatchScored)[SKIP:], "seconds_s")

    @property
    def _acquire_s(self) -> float:
        """Seconds of waits for the route before the steps."""
        in_all = self.total("source/wait_s") if self._route == "interruption" else 0.0
        return max(in_all, _sum(typed(self.events, BatchScored)[SKIP:], "seconds_s"))

    @property
    def _score_times(self) -> tuple[float, float]:
        """Seconds a token that is read, and a checkout."""
        if self._route in AHEAD:
            parts = {name: self.total(f"source/{name}") for name in ("score_s", "switch_s", "check_s", "num_checkouts")}
        else:
            scored = typed(self.events, BatchScored)[SKIP:]
            parts = {name: _sum(scored, name) for name in ("switch_s", "check_s", "num_checkouts")}
            parts["score_s"] = _sum(scored, "seconds_s")
        if not self._num_read:
            return 0.0, 0.0
        other_s = parts["switch_s"] + parts["check_s"]
        return (parts["score_s"] - other_s) / self._num_read, other_s / max(1.0, parts["num_checkouts"])

    def _scorer_times(self, config: RunConfig) -> ScorerTimes:
        if self._route != "dedicated":
            raise ConfigError(
                "this run does not tell how fast a dedicated scorer is",
                got=f"proximal.source = '{self._route}'",
                allowed="a run with proximal.source = 'dedicated'",
                fix="simulate another route, or start from another run",
            )
        read_s, checkout_s = self._score_times
        return ScorerTimes(read_s=read_s, checkout_s=checkout_s, window=config.proximal.scorer_versions)


def _busy_s(updates: Sequence[Mapping[str, float]], who: str) -> float:
    return sum((1 - update[f"idle/{who}_share"]) * update["time/update_s"] for update in updates)


def _engine_seconds(update: Mapping[str, float], times: EngineTimes) -> tuple[float, float]:
    """What the engine's work of an update takes by its step times, and what it took."""
    decode_s = times.step_s * update["engine/decode_num"] + times.sequence_s * update["engine/decode_size"]
    prefill_s = times.wave_s * update["engine/prefill_num"] + times.prefill_s * update["engine/prefill_size"]
    return decode_s + prefill_s, update["engine/decode_s"] + update["engine/prefill_s"]


def _trained(updates: Sequence[Mapping[str, float]]) -> list[int]:
    """Trajectories of each update."""
    ends = [0, *(round(update["accounting/trained"]) for update in updates)]
    return [b - a for a, b in pairwise(ends)]


def _groups(paths: Sequence[Path]) -> tuple[tuple[Episode, ...], ...]:
    """The turns of every trained episode: a stretch of loss tokens without a gap in their positions is a turn."""
    groups: dict[str, list[Episode]] = defaultdict(list)
    for path in paths:
        table = pq.read_table(path, columns=["trajectory", "index"])
        names, index = np.array(table.column("trajectory").to_pylist()), table.column("index").to_numpy()
        order = np.lexsort((index, names))
        names, index = names[order], index[order]
        starts = np.flatnonzero(np.r_[True, names[1:] != names[:-1]])
        for start, end in zip(starts, [*starts[1:], len(names)], strict=True):
            groups[str(names[start]).rpartition(".")[0]].append(_episode(index[start:end]))
    return tuple(tuple(episodes) for _, episodes in sorted(groups.items()))


def _episode(index: NDArray[np.int32]) -> Episode:
    """From the positions of the sampled tokens of one trajectory.

    Example:
        Positions 5, 6, 9: a prompt of 5 and a turn of 2, then 2 read and a turn of 1.
    """
    breaks = np.flatnonzero(np.diff(index) > 1) + 1
    turns, end = [], 0
    for stretch in np.split(index, breaks):
        turns.append(Turn(num_read=int(stretch[0]) - end, num_sampled=len(stretch)))
        end = int(stretch[-1]) + 1
    return tuple(turns)


def _gaps(updates: Sequence[Mapping[str, float]]) -> dict[Kind, Quantiles]:
    return {kind: found for kind in KINDS if (found := _quantiles(updates, kind))}


def _quantiles(updates: Sequence[Mapping[str, float]], kind: Kind) -> Quantiles:
    """Of all gaps of a kind together, about: the weighted means of those of each update, scaled to the mean gap."""
    counted = [update for update in updates if update.get(f"turn/num_{kind}")]
    if not counted:
        return ()
    weights = np.array([update[f"turn/num_{kind}"] for update in counted])

    def mean(key: str) -> float:
        return float(np.average([update[f"turn/{kind}{key}_s"] for update in counted], weights=weights))

    middle, high = (math.log(2), mean("_p50")), (math.log(10), mean("_p90"))
    slope = (high[1] - middle[1]) / (high[0] - middle[0])
    points = [(0.0, max(0.0, middle[1] - slope * middle[0])), middle, high, (math.log(100), mean("_p99"))]
    longest = (math.log(max(weights.sum(), 101.0)), max(update[f"turn/{kind}_max_s"] for update in counted))
    points.append((longest[0], max(longest[1], points[-1][1])))
    scale = mean("") / _mean_of_quantiles(points)
    return tuple((x, y * scale) for x, y in points)


def _mean_of_quantiles(points: Sequence[tuple[float, float]]) -> float:
    """Of a distribution with these quantiles at -ln(1 - u), joined by lines: a part from x0 to x1 of slope b adds
    ``e^-x0 (y0 + b) - e^-x1 (y1 + b)``; beyond the last point it stands still."""  # noqa: D205, D209
    total = points[-1][1] * math.exp(-points[-1][0])
    for (x0, y0), (x1, y1) in pairwise(points):
        slope = (y1 - y0) / (x1 - x0)
        total += math.exp(-x0) * (y0 + slope) - math.exp(-x1) * (y1 + slope)
    return total


def _slower(workload: MeasuredWorkload, latency_s: float) -> MeasuredWorkload:
    """With a simulated, exponentially distributed latency that is this much longer on average."""
    late: tuple[Kind, ...] = ("gap", "last")
    gaps_s = {kind: tuple((x, max(0.0, y + latency_s * x)) for x, y in workload.gaps_s[kind]) for kind in late}
    return replace(workload, gaps_s={**workload.gaps_s, **gaps_s})


def _sum(events: Sequence[Event], key: str) -> float:
    return sum(float(getattr(event, key)) for event in events)


def _mean(events: Sequence[Event], key: str) -> float:
    return _sum(events, key) / max(1, len(events))
