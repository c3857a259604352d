"""``oldlogits report A B``: several runs on one page, their curves over each other and their ends side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from oldlogits.core.errors import ConfigError
from oldlogits.record.folder import write_atomic
from oldlogits.record.intervals import success_of
from oldlogits.record.report import charts
from oldlogits.record.report.charts import Figure, Line
from oldlogits.record.report.data import RunData, binned, read_run
from oldlogits.record.report.frame import page_template
from oldlogits.record.report.series import legend, series, within_axis

MOST: Final = 5
"""Runs on one page: as many as there are colours and dashes to tell them apart."""
_MAX_POINTS: Final = 240
_CURVES: Final[Mapping[str, str]] = {
    "reward/mean": "Reward in training",
    "mask/rho": "Active tokens (rho)",
    "ratio/log_r_s_abs_mean": "Size of r_s: mean |log r_s|",
    "ratio/log_r_d_abs_mean": "Size of r_d: mean |log r_d|",
    "policy/entropy": "Entropy of the policy, nats",
    "staleness/mean": "Mean staleness, versions",
    "time/update_s": "Seconds of an update",
    "episode/sampled_tokens": "Sampled tokens of an episode",
}


def write_comparison(folders: Sequence[Path], out: Path) -> Path:
    """Write the page of two to five run folders; returns its path.

    Raises:
        ConfigError: There are too many.
        RecordError: A file is damaged other than by a kill.
    """
    if not 2 <= len(folders) <= MOST:
        raise ConfigError(
            "so many runs are not compared", got=f"{len(folders)}", allowed=f"2 to {MOST}", fix="name fewer of them"
        )
    runs = dict(zip(_names(folders), map(read_run, folders), strict=True))
    held_out = _held_out(runs)
    found = [figure for key, title in _CURVES.items() if (figure := _overlaid(title, _points(runs, key)))]
    page = page_template("comparison.html").render(
        title=" against ".join(runs),
        figures=[*([held_out] if held_out else []), *found],
        header=("", *runs),
        rows=[(label, *(text(run) for run in runs.values())) for label, text in _ROWS.items()],
        differences=_differences(runs),
    )
    write_atomic(out, page)
    return out


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' names, with so many of their parents that they differ."""
    absolute = [folder.absolute() for folder in folders]
    for depth in range(1, max(len(path.parts) for path in absolute) + 1):
        names = ["/".join(path.parts[-depth:]) for path in absolute]
        if len(set(names)) == len(names):
            return names
    return [f"{path} ({number})" for number, path in enumerate(absolute, 1)]


def _points(runs: Mapping[str, RunData], key: str) -> dict[str, list[charts.Point]]:
    return {name: series(binned(run.updates, _MAX_POINTS), key) for name, run in runs.items()}


def _held_out(runs: Mapping[str, RunData]) -> Figure | None:
    """Success in sampled evaluations."""
    points = {
        name: [(float(e.version), e.mean) for e in run.evaluations if e.mode == "sampled" and e.num_episodes]
        for name, run in runs.items()
    }
    return _overlaid("Held-out success, sampled", points, is_share=True)


def _overlaid(title: str, points: Mapping[str, Sequence[charts.Point]], *, is_share: bool = False) -> Figure | None:
    lines = [
        Line(label=name, points=found, colour=f"c{index}", style="dots" if is_share else "plain")
        for index, (name, found) in enumerate(points.items())
        if found
    ]
    if not lines:
        return None
    values, beyond = within_axis([line.points for line in lines])
    last = max(at for line in lines for at, _ in line.points)
    is_narrow = min(values) > 0.5 * max(values)  # such as rho: from zero on, it would be one line
    low, high = (0.0, 1.0) if is_share else (min(values) if is_narrow else min(0.0, *values), max(values))
    svg = charts.line_chart(charts.x_axis(0.0, last, whole=True), charts.y_axis(low, high), lines, x_label="version")
    return Figure(title=title, caption=beyond, svg=svg, legend=legend(lines))


def _success(run: RunData, stage: str) -> str:
    found = [e for e in run.evaluations if e.stage == stage and e.mode == "sampled" and e.num_episodes]
    return str(success_of(found[-1])) if found else "—"


def _idle(run: RunData) -> str:
    shares = (run.summary.engine_idle_share, run.summary.trainer_idle_share)
    return " / ".join("—" if share is None else f"{share:.0%}" for share in shares)


def _exact(run: RunData) -> str:
    total = sum(run.summary.provenance.values())
    return f"{run.summary.provenance.get('exact', 0) / total:.1%}" if total else "—"


_ROWS: Final[Mapping[str, Callable[[RunData], str]]] = {
    "updates": lambda run: f"{len(run.updates)} ({run.ended or 'killed or running'})",
    "held-out success before": lambda run: _success(run, "before"),
    "held-out success after": lambda run: _success(run, "after"),
    "gain, paired": lambda run: "—" if run.summary.gain is None else f"{run.summary.gain.points} points",
    "trained trajectories": lambda run: f"{run.summary.num_trajectories:,}",
    "exact old log-probs": _exact,
    "failed episodes": lambda run: f"{sum(run.summary.failures.values()):,}",
    "training time": lambda run: f"{run.summary.train_wall_s:.0f} s",
    "idle: engine / trainer": _idle,
}
"""What stands side by side."""


def _differences(runs: Mapping[str, RunData]) -> list[tuple[str, ...]]:
    """The lines of the recipes that are not the same in all, each with the table it stands in."""
    found = [dict(_keys(run.config)) for run in runs.values()]
    keys = sorted({key for keys in found for key in keys})
    rows = ((key, *(keys.get(key, "—") for keys in found)) for key in keys)
    return [row for row in rows if len(set(row[1:])) > 1]


def _keys(config: str) -> list[tuple[str, str]]:
    table, pairs = "", []
    for line in config.splitlines():
        if line.startswith("["):
            table = line.strip("[] ") + "."
        elif " = " in line:
            key, _, value = line.partition(" = ")
            pairs.append((table + key.strip(), value))
    return pairs
