"""``report.html``: one self-contained page that shows what a run folder has recorded, and says what is missing."""

from __future__ import annotations

import json
import time
import tomllib
from contextlib import suppress
from pathlib import Path
from typing import Final

from markupsafe import Markup

from oldlogits.record.folder import RunFolder, write_atomic
from oldlogits.record.intervals import reward_of, success_of, verdict_of
from oldlogits.record.live.conclusion import reward_sentences
from oldlogits.record.owner import is_owned
from oldlogits.record.report.cards import Card, Tone, figure_cards, health_cards
from oldlogits.record.report.data import RunData, read_run
from oldlogits.record.report.figures import figures
from oldlogits.record.report.frame import page_template
from oldlogits.record.report.transcripts import chosen_transcripts

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
        title=_title(run),
        origin=_origin(run),
        health=health_cards(run),
        cards=figure_cards(run),
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


def _title(run: RunData) -> str:
    """Recipe, variant and run."""
    if not run.started:
        return f"A run that never started · {run.path.name}"
    return " · ".join(filter(None, (_target(run), run.setting("variant"), run.path.name)))


def _target(run: RunData) -> str:
    """What the recipe trains on: an environment or a program."""
    with suppress(tomllib.TOMLDecodeError):
        env = tomllib.loads(run.config).get("env", {})
        return str(env.get("program") or env.get("target") or "")
    return ""


def _origin(run: RunData) -> str:
    """When and where it ran, and with which code."""
    path, found = run.path / "environment.json", list[str]()
    with suppress(OSError, ValueError):
        began = time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))
        said = json.loads(path.read_text(encoding="utf-8"))
        packages, commit = said.get("packages") or {}, said.get("git_commit") or ""
        found = [began, f"{said.get('num_cpus', '?')} CPUs", f"Python {said.get('python', '?')}"]
        found += [f"{name} {packages[name]}" for name in ("torch", "oldlogits") if packages.get(name)]
        found += [f"commit {commit[:7]}"] if commit else []
    return " · ".join(found)


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
