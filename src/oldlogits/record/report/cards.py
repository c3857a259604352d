"""The cards of a run's report: first a verdict on each thing that can go wrong, with its range, then the figures of the run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean
from typing import Final, Literal

from oldlogits.record.failures import in_words
from oldlogits.record.report.data import RunData
from oldlogits.record.summary import Summary

Tone = Literal["plain", "good", "bad"]

_RECENT: Final = 10
"""Updates at the end of a run that a verdict on its course is of."""
_ACTIVE, _UNIFORM, _FAILED, _IDLE = 0.9, 0.8, 0.05, 0.2
"""Healthy: more tokens active; fewer groups without a signal; fewer failed episodes. From so much on waiting is told."""


@dataclass(frozen=True, slots=True)
class Card:
    """One figure of the run in large type."""

    label: str
    value: str
    detail: str = ""
    tone: Tone = "plain"


def health_cards(run: RunData) -> list[Card]:
    """Return a verdict on each part of a run's health that was recorded, with what it was judged by."""
    if not run.updates:
        return []
    return [*_correctness(run), *_course(run), *_limit(run.summary)]


def _correctness(run: RunData) -> Iterator[Card]:
    """Say whether staleness kept its bound, the old log-probs are exact, and engine and trainer agree."""
    lags = [int(lag) for update in run.updates for lag in update.staleness_counts]
    bound = run.bound("max_staleness")
    if lags and bound is not None:
        holds = max(lags) <= bound
        value = "within its bound" if holds else "BOUND BROKEN"
        yield Card("staleness", value, f"largest {max(lags)}, bound {bound:g}", _tone(holds))
    provenance = run.summary.provenance
    if tokens := sum(provenance.values()):
        exact = provenance.get("exact", 0) / tokens
        others = ", ".join(kind for kind, count in sorted(provenance.items()) if count and kind != "exact")
        value, detail = "all exact" if exact == 1 else f"{exact:.0%} exact", f"{tokens:,} tokens"
        yield Card(
            "old log-probs", value, detail + (f"; others: {others}" if others else ""), "good" if exact == 1 else "plain"
        )
    if run.summary.probe_max_abs_error is not None:
        detail = f"largest error {run.summary.probe_max_abs_error:.1e} nats; a run stops beyond the engine's numerics"
        yield Card("engine and trainer", "DISAGREE" if run.ended == "error" else "agree", detail, "plain")


def _course(run: RunData) -> Iterator[Card]:
    """Say whether enough tokens are active, groups have a signal, and episodes end by themselves."""
    kept = _recent(run, "mask/rho")
    if kept is not None:
        is_healthy, detail = kept >= _ACTIVE, f"rho {kept:.3f} over the last updates; healthy above {_ACTIVE:g}"
        yield Card("active tokens", "enough" if is_healthy else "FEW", detail, _tone(is_healthy))
    uniform = _recent(run, "reward/uniform_groups")
    if uniform is not None:
        is_healthy = uniform <= _UNIFORM
        detail = f"{uniform:.0%} without one over the last updates; healthy below {_UNIFORM:.0%}"
        yield Card("groups with a signal", "enough" if is_healthy else "FEW", detail, _tone(is_healthy))
    share = sum(run.summary.failures.values()) / max(run.summary.accounting.get("submitted", 0), 1)
    value = "none" if not share else "few" if share <= _FAILED else "MANY"
    told = f": {in_words(run.summary.failures, most=2)}" if run.summary.failures else ""
    detail = f"{share:.1%}{told}; healthy below {_FAILED:.0%}"
    yield Card("failed episodes", value, detail, _tone(share <= _FAILED))


def _limit(summary: Summary) -> Iterator[Card]:
    """Say what limits the speed: the side that the other one waits for."""
    engine, trainer = summary.engine_idle_share, summary.trainer_idle_share
    if engine is None or trainer is None:
        return
    limit = "sampling" if trainer >= max(engine, _IDLE) else "training" if engine >= _IDLE else "nothing alone"
    detail = f"idle: engine {engine:.0%}, trainer {trainer:.0%}; the side that is less idle is the limit"
    yield Card("what limits the speed", limit, detail)


def _tone(is_healthy: bool) -> Tone:
    return "good" if is_healthy else "bad"


def _recent(run: RunData, key: str) -> float | None:
    """Return the mean of a metric over the last updates."""
    found = [update.metrics[key] for update in run.updates[-_RECENT:] if key in update.metrics]
    return fmean(found) if found else None


def figure_cards(run: RunData) -> list[Card]:
    """Return the figures of a run."""
    ended = run.ended or "killed or running"
    cards = [Card("updates", f"{len(run.updates)}", f"ended: {ended}", "bad" if ended == "error" else "plain")]
    return [*cards, *_summary_cards(run.summary)] if run.updates else cards


def _summary_cards(summary: Summary) -> Iterator[Card]:
    trained, several = summary.num_trajectories, summary.num_multi_version_trajectories
    yield Card("trajectories", f"{trained:,}", "trained on")
    yield Card("of several versions", _share(several / trained if trained else None), f"{several:,} trajectories")
    if summary.num_digests:
        yield Card("old weights", "bit-exact", f"{summary.num_digests:,} checkouts compared by digest", "good")
    measured = (
        ("checkout error", summary.consistency_publish_max_abs_error, "nats, largest: stored against published weights"),
        ("lag-0 error", summary.consistency_lag0_max_abs_error, "nats, largest: old against theta, before the first step"),
        ("lag-0 error, scored apart", summary.consistency_rescored_max_abs_error, "nats, largest: in another packing"),
        ("packing noise", summary.packing_mean_abs_error, f"nats, mean; largest {_small(summary.packing_max_abs_error)}"),
        ("mean |log r_d|", summary.log_r_d_mean_abs, f"largest {_small(summary.log_r_d_max_abs)}"),
    )
    yield from (Card(label, _small(value), detail) for label, value, detail in measured if value is not None)
    yield Card("training time", _duration(summary.train_wall_s), "without the evaluations before and after")
    yield from _version_cards(summary)
    if summary.num_servers_down or summary.num_lost_tokens:
        yield Card("lost tokens", f"{summary.num_lost_tokens:,}", f"sampled anew; server failures: {summary.num_servers_down}")
    if summary.num_dropped_nonfinite:
        yield Card("tokens dropped", str(summary.num_dropped_nonfinite), "log-prob not finite", "bad")


def _version_cards(summary: Summary) -> Iterator[Card]:
    """What a version costs to keep, to switch to and to send."""
    if summary.version_bytes_mean is not None:
        shares = f"{_share(summary.version_share_of_copy)} of a copy, {_share(summary.version_share_of_average)} of an average"
        yield Card("a stored version", _bytes(summary.version_bytes_mean), shares)
    if summary.switch_mean_s is not None:
        yield Card("a switch", f"{1e3 * summary.switch_mean_s:.2f} ms", "to another version, mean")
    if summary.sync_bytes_mean is not None:
        refused = f", {summary.num_refused_patches} refused" if summary.num_refused_patches else ""
        kinds = f"{summary.num_patch_syncs} patches, {summary.num_full_syncs} full{refused}"
        yield Card("sent per version", _bytes(summary.sync_bytes_mean), kinds)
    if summary.trainer_copies_max is not None:
        copies = f"{summary.trainer_copies_max:.2f} + {summary.engine_copies_max}"
        yield Card("copies of the weights", copies, "trainer + engine, at most")


def _bytes(num: float) -> str:
    size, unit = next((found for found in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")) if num >= found[0]), (1, "B"))
    return f"{num / size:.3g} {unit}"


def _share(value: float | None) -> str:
    return "—" if value is None else f"{value:.1%}" if value < 1 else "100%"


def _small(value: float | None) -> str:
    return "—" if value is None else "0" if value == 0 else f"{value:.1e}" if abs(value) < 0.001 else f"{value:.3g}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
