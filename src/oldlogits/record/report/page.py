"""``report.html``: one self-contained page that shows what a run folder has recorded, and says what is missing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from markupsafe import Markup

from oldlogits.record.failures import in_words
from oldlogits.record.folder import RunFolder, write_atomic
from oldlogits.record.intervals import reward_of, success_of, verdict_of
from oldlogits.record.live.conclusion import reward_sentences
from oldlogits.record.owner import is_owned
from oldlogits.record.report.data import RunData, read_run
from oldlogits.record.report.figures import figures
from oldlogits.record.report.frame import page_template
from oldlogits.record.report.transcripts import chosen_transcripts
from oldlogits.record.summary import Summary

Tone = Literal["plain", "good", "bad"]

_DETAILS: Final = {
    "source": "source",
    "runtime": "runtime",
    "engine numerics": "numerics",
    "model": "model",
    "parameters": "num_parameters",
    "max. staleness": "max_staleness",
    "band": "band",
    "eps low": "eps_low",
    "eps high": "eps_high",
    "truncation": "truncation",
    "denominator": "denominator",
    "groups x size": "prompts_per_update",
    "seed": "seed",
}
_MOST_WARNINGS: Final = 20

REFRESH_S: Final = 30
"""Seconds after which the page of a run that goes on reads itself again."""


@dataclass(frozen=True, slots=True)
class Card:
    """One figure of the run in large type."""

    label: str
    value: str
    detail: str = ""
    tone: Tone = "plain"


def write_report(run_folder: Path) -> Path:
    """Write ``report.html`` from the files of a run folder, complete or not.

    Raises:
        RecordError: A file is damaged other than by a kill.
    """
    report = RunFolder(path=run_folder).report
    write_atomic(report, report_page(run_folder))
    return report


def report_page(run_folder: Path) -> str:
    """Return the text of the page; that of a run which goes on reads itself again every 30 seconds.

    Raises:
        RecordError: A file is damaged other than by a kill.
    """
    run = read_run(run_folder)
    return page_template("report.html").render(
        run=run,
        formula=_formula(run),
        verdict=_verdict(run),
        cards=_cards(run),
        to_know=_to_know(run),
        details=_details(run),
        sections=figures(run),
        transcripts=chosen_transcripts(run.episodes),
        environments=run.summary.environments,
        provenance=sorted(run.summary.provenance.items()),
        accounting=list(run.summary.accounting.items()),
        tallies={
            "Failed episodes of training, by reason": run.summary.failures,
            "Failed episodes of evaluations, by reason": run.summary.evaluation_failures,
            "What the agent program asked for in training": run.summary.gateway,
        },
        refresh_s=REFRESH_S if run.ended is None and is_owned(run_folder) else 0,
    )


def _formula(run: RunData) -> Markup:
    """The variant's row: r_d = OLD / MU, r_s = THETA / OLD."""
    ratios = [(name, run.setting(name)) for name in ("r_d", "r_s") if run.setting(name)]
    parts = [
        Markup("<var>r</var><sub>{}</sub> = {}").format(name[-1], ratio.upper().replace("/", " / ")) for name, ratio in ratios
    ]
    return Markup(" \u00a0 ").join(parts)


def _verdict(run: RunData) -> Card:
    """What was learned, and the evidence."""
    before, after, gain = run.summary.success_before, run.summary.success_after, run.summary.gain
    if before is None or after is None:
        measured = "No held-out episode was played."
        if played := [e for e in run.evaluations if e.num_episodes]:
            e = played[-1]
            measured = f"Latest evaluation ({e.mode}, version {e.version}): {success_of(e)}; mean reward {reward_of(e).plain}."
        return Card("verdict", "No comparison of before and after", measured)
    evidence = " ".join([f"Sampled on held-out episodes: {before} before, {after} after.", *reward_sentences(run.summary)])
    headline = f"{before.mean:.1%} → {after.mean:.1%}"
    if gain is None:
        return Card("verdict", headline, evidence)
    evidence += f" Paired over the same {gain.num_episodes} episodes: {gain.points} points, 95% interval."
    tones: dict[str, Tone] = {"better": "good", "worse": "bad"}
    verdict = verdict_of(gain)
    return Card("verdict", f"{headline}: {verdict}", evidence, tones.get(verdict, "plain"))


def _cards(run: RunData) -> list[Card]:
    ended = run.ended or "killed or running"
    cards = [Card("updates", f"{len(run.updates)}", f"ended: {ended}", "bad" if ended == "error" else "plain")]
    lags = [int(lag) for update in run.updates for lag in update.staleness_counts]
    bound = run.bound("max_staleness")
    if lags and bound is not None:
        holds = max(lags) <= bound
        detail = f"bound {bound:g}: {'kept' if holds else 'broken'}"
        cards.append(Card("largest staleness", str(max(lags)), detail, "good" if holds else "bad"))
    if run.summary.probe_max_abs_error is not None:
        error = f"{run.summary.probe_max_abs_error:.1e}"
        cards.append(Card("probe, largest error", error, "engine against trainer, after each publish"))
    return [*cards, *_summary_cards(run.summary)] if run.updates else cards


def _summary_cards(summary: Summary) -> Iterator[Card]:
    trained, several = summary.num_trajectories, summary.num_multi_version_trajectories
    yield Card("trajectories", f"{trained:,}", "trained on")
    yield Card("of several versions", _share(several / trained if trained else None), f"{several:,} trajectories")
    tokens = sum(summary.provenance.values())
    if tokens:
        exact = summary.provenance.get("exact", 0) / tokens
        others = ", ".join(kind for kind, count in sorted(summary.provenance.items()) if count and kind != "exact")
        detail = f"of {tokens:,} tokens" + (f"; others: {others}" if others else "")
        yield Card("exact old logits", _share(exact), detail, "good" if exact == 1 else "plain")
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
    idle = f"idle: engine {_share(summary.engine_idle_share)}, trainer {_share(summary.trainer_idle_share)}"
    yield Card("training time", _duration(summary.train_wall_s), idle)
    yield from _version_cards(summary)
    if summary.failures:
        share = sum(summary.failures.values()) / max(summary.accounting.get("submitted", 0), 1)
        yield Card("failed episodes", _share(share), in_words(summary.failures), "bad")
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


def _to_know(run: RunData) -> list[str]:
    """What a complete run would have recorded and this one has not, and its warnings."""
    absent = {
        "The run never started: there is no run_started event.": not run.started,
        "No end was recorded: the process was killed, or is still running.": run.ended is None,
        f"The run ended with an error: {run.error}": bool(run.error),
        "The run was interrupted before its last update.": run.ended == "interrupted",
        "No update was recorded.": not run.updates,
        "No evaluation was recorded.": not run.evaluations,
        **_unplayed(run),
        "There are no token tables: the distributions of the ratios are not shown.": not len(run.tokens["log_r_s"]),
        "No episode was recorded with its text.": not run.episodes,
    }
    said = [text for text, is_absent in absent.items() if is_absent]
    said += [f"Warning: {text}" for text in run.warnings[:_MOST_WARNINGS]]
    if len(run.warnings) > _MOST_WARNINGS:
        said.append(f"{len(run.warnings) - _MOST_WARNINGS} more warnings in events.jsonl.")
    return said


def _unplayed(run: RunData) -> dict[str, bool]:
    """Evaluations in which episodes failed, in words: rates and intervals are over those played."""
    return {
        f"The {e.mode} evaluation {'at version ' + str(e.version) if e.stage == 'during' else e.stage + ' training'} is of "
        f"{e.num_episodes} of {len(e.rewards)} episodes played; the others failed.": e.num_episodes < len(e.rewards)
        for e in run.evaluations
    }


def _details(run: RunData) -> list[tuple[str, str]]:
    shown = {name: run.setting(name) for name in _DETAILS.values()}
    if shown["num_parameters"].isdigit():
        shown["num_parameters"] = f"{int(shown['num_parameters']):,}"
    if shown["prompts_per_update"]:
        shown["prompts_per_update"] += f" x {run.setting('group_size')}"
    return [(label, shown[name]) for label, name in _DETAILS.items() if shown[name]]


def _share(value: float | None) -> str:
    return "—" if value is None else f"{value:.1%}" if value < 1 else "100%"


def _small(value: float | None) -> str:
    return "—" if value is None else "0" if value == 0 else f"{value:.1e}" if abs(value) < 0.001 else f"{value:.3g}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
