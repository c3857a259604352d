"""The system cost of each route to the old logits, measured in runtime "local", one run at a time.

route_config -> run -> events.jsonl -> read_cost -> RouteCost ... -> cost_table, the paper's figures beside ours
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Final

from oldlogits.config.check import check
from oldlogits.config.schema import RunConfig
from oldlogits.core.errors import ConfigError
from oldlogits.core.policies import EXPERIMENTAL_VARIANTS, VARIANTS
from oldlogits.core.source import SOURCES, provided
from oldlogits.record.bus import Event
from oldlogits.record.event_log import read_events, typed
from oldlogits.record.events import BatchScored, BatchTaken, RunStarted, Updated, VersionPublished
from oldlogits.record.folder import RunFolder
from oldlogits.record.jsonl import RecordError
from oldlogits.run.run import run
from studies.old_logits.layout import DASH

WARM_UP: Final = 2
"""Updates at the beginning that are left out: processes, queues and the window of versions fill."""

FP32_BYTES: Final = 4

Numbers = Mapping[str, float]
"""The recorded numbers of one update: its metrics, and what its batch, its scores and its publish add."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteCost:
    """What a route costs beside training itself. Seconds are medians over the updates after the first two.

    Args:
        route: Its name in a recipe.
        num_updates: That the figures are over.
        weights_bytes: One fp32 copy of the weights.
        stored_bytes: The most that the route kept beside the live weights: version store, average, window of a dedicated
            scorer; the rounded copy of `rescore`, which every run holds for its probe, is counted there alone.
        resident_copies: Copies of the weights on the trainer's side: ``1 + stored_bytes / weights_bytes``.
        num_switches: Switches of the scoring weights from one version to another, mean per update.
        switch_s: Seconds until the scoring module points at a version's weights, checkout included, mean over all checkouts;
            the consistency check that follows is a part of `score_s`; None: no switch.
        forwards: Tokens that the forward passes for the proximal policy read / tokens of the batches, context included.
        score_s: The scorer worked.
        wait_s: The update waited for scores.
        keep_s: Storing a version, or taking it into the average.
        extra_s: ``wait_s + keep_s``, update by update: what the route adds to an update.
        stall_s: The engine stood still.
        hidden_share: ``1 - sum wait_s / sum score_s``, at least 0: scoring that nobody waited for; None: nothing was scored.
        update_s: The whole update.
        trajectories_per_s: Trained trajectories / seconds of the updates.
    """

    route: str
    num_updates: int
    weights_bytes: int
    stored_bytes: int
    resident_copies: float
    num_switches: float
    switch_s: float | None
    forwards: float
    score_s: float
    wait_s: float
    keep_s: float
    extra_s: float
    stall_s: float
    hidden_share: float | None
    update_s: float
    trajectories_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PrintedCost:
    """What the paper prints for a route.

    Args:
        backbone: The model.
        route: Our name of the route.
        switch_s: Seconds of a switch.
        stored_bytes: CPU storage.
        extra_s: Extra time.
    """

    backbone: str
    route: str
    switch_s: float
    stored_bytes: int
    extra_s: float


PRINTED: Final = (
    PrintedCost(backbone="Qwen3-4B", route="snapshot", switch_s=7.0, stored_bytes=40_000_000_000, extra_s=25.0),
    PrintedCost(backbone="Qwen3-30B-A3B", route="snapshot", switch_s=14.2, stored_bytes=76_400_000_000, extra_s=150.0),
    PrintedCost(backbone="Qwen3-4B", route="ewma", switch_s=7.0, stored_bytes=7_900_000_000, extra_s=8.0),
    PrintedCost(backbone="Qwen3-30B-A3B", route="ewma", switch_s=14.2, stored_bytes=15_200_000_000, extra_s=34.0),
)
"""PAPER, "Cost as printed": snapshot against PPO-EWMA."""


def route_config(config: RunConfig, route: str) -> RunConfig:
    """A recipe under another route, with the variant that the route is for; without evaluation, resets and audit.

    Args:
        config: The recipe.
        route: A key of `SOURCES`.

    Raises:
        ConfigError: The recipe does not go with the route.
    """
    rows = {**VARIANTS, **EXPERIMENTAL_VARIANTS}
    provides = provided(SOURCES.find(route))
    variant = next(name for name, row in rows.items() if row.needs == provides and row.corrects_mismatch)
    changed = replace(
        config,
        variant=variant,
        proximal=replace(config.proximal, source=route, reset="none"),
        audit=replace(config.audit, share=0.0),
        eval=replace(config.eval, num_episodes=0, every=0),
    )
    check(changed)
    return changed


def measure_route(config: RunConfig, out: Path) -> RouteCost:
    """Run a recipe, with nothing else on the machine, and read what its route cost.

    Args:
        config: A checked recipe, as `route_config` makes it; its number of updates is that of the measurement.
        out: The run folder.

    Raises:
        ConfigError: There are too few updates, or an audit, whose stored versions would be counted.
        RecordError: The run was interrupted.
        OldLogitsError: The run failed.
    """
    if config.num_updates <= WARM_UP or config.audit.share > 0:
        raise ConfigError(
            "the cost of a route is measured over the updates after the first two, without an audit",
            got=f"num_updates = {config.num_updates}, audit.share = {config.audit.share}",
            allowed=f"num_updates > {WARM_UP}, audit.share = 0",
            fix="num_updates = 12, and remove audit.share",
        )
    result = run(config, out)
    if result.error is not None:
        raise result.error
    if result.summary.ended != "done":
        raise RecordError(
            f"the cost of route '{config.proximal.source}' was not measured: its run was {result.summary.ended}",
            got=f"{result.summary.num_updates} updates in {out}",
            allowed=f"{config.num_updates} updates",
            fix="measure it again in another folder",
        )
    return read_cost(out)


def read_cost(run_folder: Path) -> RouteCost:
    """What the route of a recorded run cost; the run must have gone through without a resume.

    Raises:
        RecordError: The run made too few updates.
    """
    events = list(read_events(RunFolder(path=run_folder).events))
    started = typed(events, RunStarted)[0]
    route, weights_bytes = started.source, FP32_BYTES * started.num_parameters
    updates = _updates(events, route)
    if len(updates) <= WARM_UP:
        raise RecordError(
            "a run is too short to measure its route",
            got=f"{len(updates)} updates in {run_folder}",
            allowed=f"more than {WARM_UP}",
            fix="raise num_updates",
        )
    measured = updates[WARM_UP:]
    stored_bytes = max(_stored_bytes(one, route, weights_bytes) for one in updates)
    switches, checkouts = (sum(one[name] for one in measured) for name in ("num_switches", "num_checkouts"))
    score_s, wait_s = (sum(one[name] for one in measured) for name in ("score_s", "wait_s"))
    trained = updates[-1]["accounting/trained"] - updates[WARM_UP - 1]["accounting/trained"]
    return RouteCost(
        route=route,
        num_updates=len(measured),
        weights_bytes=weights_bytes,
        stored_bytes=stored_bytes,
        resident_copies=1 + stored_bytes / weights_bytes,
        num_switches=switches / len(measured),
        switch_s=sum(one["switch_s"] for one in measured) / checkouts if switches else None,
        forwards=sum(one["read_tokens"] for one in measured) / sum(one["num_tokens"] for one in measured),
        score_s=median(one["score_s"] for one in measured),
        wait_s=median(one["wait_s"] for one in measured),
        keep_s=median(_keep_s(one) for one in measured),
        extra_s=median(one["wait_s"] + _keep_s(one) for one in measured),
        stall_s=median(one["time/stall_s"] for one in measured),
        hidden_share=max(0.0, 1 - wait_s / score_s) if score_s else None,
        update_s=median(one["time/update_s"] for one in measured),
        trajectories_per_s=trained / sum(one["time/update_s"] for one in measured),
    )


def _updates(events: Sequence[Event], route: str) -> list[Numbers]:
    """By update, ascending. A route that scores ahead counts its scorer's work; for the others it is the trainer's."""
    numbers: dict[int, dict[str, float]] = {}
    work = ("read_tokens", "num_checkouts", "switch_s")
    nothing = dict.fromkeys(("num_switches", "score_s", "wait_s", *work), 0.0)
    for event in events:
        before = isinstance(event, BatchTaken | BatchScored)  # these have the version that the update starts from
        one = numbers.setdefault(event.version + before, nothing.copy())
        if isinstance(event, BatchTaken):
            one["num_tokens"] = event.num_tokens
        elif isinstance(event, BatchScored):
            one |= {name: float(getattr(event, name)) for name in ("num_switches", *work)}
            one["score_s"] = one["wait_s"] = event.seconds_s
        elif isinstance(event, VersionPublished):
            one |= {"bytes": event.bytes, "store_s": event.store_s}
        elif isinstance(event, Updated):
            metrics = event.metrics
            ahead = {name: f"source/{name}" for name in ("score_s", "wait_s", *work)}
            one |= {**metrics} | {name: metrics[key] for name, key in ahead.items() if key in metrics}
    return [one for _, one in sorted(numbers.items()) if "time/update_s" in one]


def _keep_s(one: Numbers) -> float:
    return one["store_s"] + one.get("average/take_in_s", 0.0)


def _stored_bytes(one: Numbers, route: str, weights_bytes: int) -> int:
    """What is kept beside the live weights; `source/resident_copies` is the window in a dedicated scorer's own process."""
    copies = {"dedicated": one.get("source/resident_copies", 0.0), "rescore": 1.0}.get(route, 0.0)
    return int(one["bytes"] + one.get("average/stored_bytes", 0.0) + copies * weights_bytes)


HEADER: Final[tuple[str, ...]] = (
    "route",
    "stored",
    "copies",
    "switches",
    "one switch",
    "forwards",
    "extra s",
    "stall s",
    "hidden",
    "update s",
    "trajectories/s",
)


def cost_table(costs: Sequence[RouteCost], printed: Sequence[PrintedCost] = PRINTED) -> tuple[tuple[str, ...], ...]:
    """The header, and a row for each route with the paper's rows for it below: the same table for every rendering."""
    rows = [HEADER]
    for cost in costs:
        rows.append(_row(cost))
        rows += [_printed_row(one) for one in printed if one.route == cost.route]
    return tuple(rows)


def _row(cost: RouteCost) -> tuple[str, ...]:
    return (
        cost.route,
        _bytes(cost.stored_bytes),
        f"{cost.resident_copies:.1f}",
        f"{cost.num_switches:.1f}",
        DASH if cost.switch_s is None else _seconds(cost.switch_s),
        f"{cost.forwards:.2f}",
        f"{cost.extra_s:.3f}",
        f"{cost.stall_s:.3f}",
        DASH if cost.hidden_share is None else f"{cost.hidden_share:.0%}",
        f"{cost.update_s:.2f}",
        f"{cost.trajectories_per_s:.1f}",
    )


def _printed_row(one: PrintedCost) -> tuple[str, ...]:
    cells = {
        "route": f"{one.route}, paper, {one.backbone}",
        "stored": _bytes(one.stored_bytes),
        "one switch": _seconds(one.switch_s),
        "extra s": f"{one.extra_s:g}",
    }
    return tuple(cells.get(column, DASH) for column in HEADER)


def _bytes(value: int) -> str:
    """Decimal units, as the paper's."""
    return f"{value / 1e9:.1f} GB" if value >= 1e9 else f"{value / 1e6:.2f} MB"


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value >= 1 else f"{1000 * value:.2f} ms"
