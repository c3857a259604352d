"""What a run looks like in the terminal while it goes on, and the panel that ends it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from oldlogits.record.bus import Event
from oldlogits.record.evaluation import by_environment
from oldlogits.record.events import (
    Calibrated,
    Evaluated,
    EvaluationProgressed,
    GroupClosed,
    Probed,
    RunStarted,
    ServerDown,
    ServerUp,
    TrajectoryFailed,
    TrajectoryRestarted,
    Updated,
    Warned,
)
from oldlogits.record.failures import FailureTally, in_words
from oldlogits.record.intervals import reward_of, success_of, verdict_of
from oldlogits.record.summary import Summary

_ROWS: Final[Mapping[str, Mapping[str, str]]] = {
    "reward": {"reward/mean": "{:.3f}"},
    "success": {"reward/success": "{:.3f}"},
    "rho": {"mask/rho": "{:.3f}", "mask/rho_band": "band {:.3f}", "mask/rho_clip": "clip {:.3f}"},
    "staleness": {"staleness/mean": "mean {:.2f}", "staleness/max": "max {:.0f}"},
    "failed": {"failed/num": "{:.0f} of", "failed/ended": "{:.0f} episodes:"},
    "queue": {"queue/running": "{:.0f} running", "queue/queued": "{:.0f} queued"},
    "tokens/s": {
        "throughput/engine_busy_tokens_per_s": "engine, while it samples: {:,.0f}",
        "throughput/trainer_tokens_per_s": "trainer: {:,.0f}",
    },
    "waiting": {
        "idle/engine_share": "engine: {:.0%} idle",
        "idle/trainer_share": "trainer: {:.0%} idle",
        "time/wait_batch_s": "waited {:.1f} s for a batch",
    },
    "evaluation": {
        "eval/ended": "{:.0f}",
        "eval/rows": "of {:.0f} ended,",
        "eval/failed": "{:.0f} of them failed",
        "eval/mean": "{:.1%}",
        "eval/low": "95% interval {:.1%}",
        "eval/high": "to {:.1%}",
        "eval/reward": "mean reward {:.3f}",
    },
    "max error": {"probe/max_abs_error": "probe {:.1e}", "consistency/max_abs_error": "consistency check {:.1e}"},
}
"""The panel's rows: label -> metric -> how it is shown."""

_PLAIN: Final[Mapping[str, str]] = {
    "reward/mean": "reward {:.3f}",
    "reward/success": "success {:.3f}",
    "mask/rho": "rho {:.3f}",
    "staleness/mean": "staleness {:.2f}",
    "staleness/max": "max {:.0f}",
    "throughput/engine_busy_tokens_per_s": "engine {:,.0f} tokens/s",
    "time/update_s": "{:.1f} s",
}
"""The line of an update where there is no terminal."""

_BARS: Final = "▁▂▃▄▅▆▇█"
_HISTORY: Final = 24
_REFRESH_PER_S: Final = 4
_MOST_KINDS: Final = 8
"""Kinds of failures whose first episode is told."""


class LiveView:
    """A panel that follows a run of `total_updates` in all; one plain line an update where the output is no terminal.

    Example:
        >>> import io
        >>> console = Console(file=io.StringIO(), width=200)
        >>> with LiveView(total_updates=2, title="demo", console=console) as view:
        ...     view.update({"reward/mean": 0.25, "mask/rho": 0.98}, version=1)
        >>> print(console.file.getvalue().rstrip())
        update 1/2  reward 0.250  rho 0.980
    """

    def __init__(self, *, total_updates: int, title: str, console: Console | None = None) -> None:
        self._total, self._title = total_updates, title
        self._console = console or Console()
        self._latest: dict[str, float] = {}
        self._history: dict[str, list[float]] = {"reward/mean": [], "reward/success": []}
        self._started: RunStarted | None = None
        self._failures, self._num_failed, self._num_ended = FailureTally(), 0, 0
        self._restarts = FailureTally()
        self._progress = Progress(
            TextColumn("[bold]update {task.completed}/{task.total}"),
            BarColumn(bar_width=None, complete_style="blue"),
            TimeElapsedColumn(),
            TextColumn("elapsed"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=self._console,
            auto_refresh=False,
            expand=True,
            speed_estimate_period=math.inf,
        )
        self._task = self._progress.add_task("", total=max(total_updates, 1))
        self._live = Live(console=self._console, get_renderable=self._panel, refresh_per_second=_REFRESH_PER_S)

    def __enter__(self) -> Self:
        """Start drawing."""
        self._progress.reset(self._task)
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Stop drawing; what was noted stays on the screen."""
        self._live.stop()

    def emit(self, event: Event) -> None:
        """Show what an event says."""
        if isinstance(event, RunStarted):
            self._started = event
        elif isinstance(event, Updated):
            self.update(event.metrics, version=event.version)
        elif isinstance(event, EvaluationProgressed):
            self.show({"eval/ended": event.num_ended, "eval/rows": event.num_episodes, "eval/failed": event.num_failed})
        elif isinstance(event, TrajectoryFailed):
            self._failed(event)
        elif isinstance(event, TrajectoryRestarted):
            self._begins_again(event.reason)
        elif isinstance(event, GroupClosed):
            self._num_ended += len(event.rewards)
            self._show_failures()
        elif isinstance(event, Evaluated):
            self._evaluated(event)
        elif isinstance(event, Probed):
            consistency = event.consistency_publish_max_abs_error
            shown = {"probe/max_abs_error": event.max_abs_error, "consistency/max_abs_error": consistency}
            self.show({name: value for name, value in shown.items() if not math.isnan(value)})
        elif isinstance(event, Calibrated):
            for line in calibration_lines(event, self._started):
                self.note(line)
        elif isinstance(event, Warned):
            self.note(f"warning: {event.message}", style="bold yellow")
        elif isinstance(event, ServerDown | ServerUp):
            what = "down" if isinstance(event, ServerDown) else "up"
            self.note(f"server {event.server} is {what}: {event.reason}")

    def _failed(self, event: TrajectoryFailed) -> None:
        """Count a failed episode; the first ones of another kind are told."""
        if self._failures.add(event.reason) and len(self._failures.by_reason()) <= _MOST_KINDS:
            self.note(f"{'an' if event.stage == 'train' else 'a held-out'} episode failed: {event.reason}")
        if event.stage == "train":
            self._num_failed, self._num_ended = self._num_failed + 1, self._num_ended + 1
            self._show_failures()

    def _begins_again(self, reason: str) -> None:
        """Tell the first episode that begins again of every reason; the summary counts the tokens of all."""
        if self._restarts.add(reason):
            self.note(f"an episode begins again: {reason}")

    def _show_failures(self) -> None:
        if self._num_failed:
            self.show({"failed/num": self._num_failed, "failed/ended": self._num_ended})

    def _evaluated(self, event: Evaluated) -> None:
        if event.mode == "sampled" and event.num_episodes:
            reward = {"eval/reward": event.reward_mean}
            self.show({"eval/mean": event.mean, "eval/low": event.low, "eval/high": event.high, **reward})
        when = f"at version {event.version}" if event.stage == "during" else f"{event.stage} training"
        num, rows = event.num_episodes, len(event.rewards)
        played = f"of {num}" if num == rows else f"of {num} played; {rows - num} of {rows} rows failed"
        rate = f"{success_of(event)} " if num else ""
        self.note(f"held-out success {when}, {event.mode}: {rate}{played}, {event.seconds_s:.0f} s")
        if num:
            self.note(f"  mean reward {reward_of(event).plain}; a success is a reward of {event.success_at:g} or more")
        for name, found in by_environment(event).items():
            self.note(f"  {name}: {found}")

    def update(self, metrics: Mapping[str, float], *, version: int) -> None:
        """Show the metrics of the update that made `version`."""
        self.show(metrics)
        self._progress.update(self._task, completed=version)
        for key, values in self._history.items():
            if key in metrics:
                values.append(metrics[key])
        if not self._console.is_terminal:
            shown = [template.format(metrics[key]) for key, template in _PLAIN.items() if key in metrics]
            shown += [f"failed {self._num_failed} of {self._num_ended}"] if self._num_failed else []
            self.note("  ".join([f"update {version}/{self._total}", *shown]))

    def show(self, metrics: Mapping[str, float]) -> None:
        """Take values between updates, by the names that the rows show; ``queue/admission_open`` is 1 or 0."""
        self._latest.update(metrics)

    def note(self, text: str, style: str = "") -> None:
        """Print a line that stays above the panel."""
        self._console.print(text, style=style, markup=False, highlight=False, soft_wrap=not self._console.is_terminal)

    def _panel(self) -> RenderableType:
        grid = Table.grid(padding=(0, 2), expand=True)
        grid.add_column(style="dim", width=10)
        grid.add_column(ratio=1)
        for label, parts in _ROWS.items():
            if row := self._row(parts):
                grid.add_row(label, row)
        return Panel(Group(self._progress, "", grid), title=escape(self._title), title_align="left", border_style="blue")

    def _row(self, parts: Mapping[str, str]) -> str:
        shown = [template.format(self._latest[key]) for key, template in parts.items() if key in self._latest]
        shown += [sparkline(self._history[key]) for key in parts if key in self._history]
        if "queue/queued" in parts and "queue/admission_open" in self._latest:
            shown.append("admission " + ("open" if self._latest["queue/admission_open"] else "closed: too much in flight"))
        if shown and "failed/num" in parts:
            shown.append(in_words(self._failures.by_reason(), most=2))
        return "  ".join(shown).strip()


def sparkline(values: list[float]) -> str:
    """The last values as blocks, scaled from their least to their greatest.

    Example:
        >>> sparkline([0.0, 0.5, 1.0])
        '▁▅█'
    """
    shown = [value for value in values[-_HISTORY:] if value == value and abs(value) != float("inf")]
    if not shown:
        return ""
    low, width = min(shown), max(shown) - min(shown)
    return "".join(_BARS[round((value - low) / width * 7) if width else 0] for value in shown)


def calibration_lines(found: Calibrated, started: RunStarted | None) -> Iterator[str]:
    """The figures of a calibration as a small table of at most 80 columns; the recipe's own band is marked."""
    yield (
        f"engine noise at lag 0: mean |log r_d| {found.log_r_d_abs_mean:.2g} nats, largest {found.log_r_d_abs_max:.2g}; "
        f"mean r_d - 1: {found.r_d_mean - 1:+.1e} +- {found.r_d_mean_error:.1e}; "
        f"{found.num_tokens:,} tokens of {found.num_trajectories} trajectories"
    )
    own = started.band if started is not None and started.r_d != "1" else None
    names = [f"{'*' if band == own else ''}{band:g}" for band in found.bands]
    yield "  a band of  " + "".join(f"{name:>8}" for name in names)
    yield "  would mask " + "".join(f"{share:>8.2%}" for share in found.masked)
    has_none = "measures its band (mask/band)" if started is not None and started.r_d != "1" else "has no band: r_d = 1"
    yield f"  this recipe {has_none}" if own is None else f"  *: this recipe, which keeps {found.kept:.1%}"


def print_summary(summary: Summary, run_folder: Path, *, console: Console | None = None) -> None:
    """Say in plain words what was learned, whether the old logits were exact, and where the report is."""
    out = console or Console()
    lines = [learned_sentence(summary), *reward_sentences(summary), *environment_sentences(summary)]
    lines += [staleness_sentence(summary), *exactness_sentences(summary)]
    lines += [*failure_sentences(summary), *program_sentences(summary.gateway)]
    if summary.ended != "done":
        lines.insert(0, f"The run ended early ({summary.ended}).")
    body = Text("\n".join(lines) + "\n")
    body.append(f"\nrun folder  {run_folder}\nreport      {run_folder / 'report.html'}", style="dim")
    out.print(Panel(body, title=f"{summary.variant}, {summary.num_updates} updates", title_align="left", border_style="green"))


def learned_sentence(summary: Summary) -> str:
    """Before -> after with intervals, and whether the difference is beyond chance."""
    before, after, gain = summary.success_before, summary.success_after, summary.gain
    if before is None or after is None:
        only, failed = before or after, sum(summary.evaluation_failures.values())
        if failed:
            said = f"Held-out success {only}" if only else "HELD-OUT SUCCESS WAS NOT MEASURED"
            return f"{said}: all episodes of {'the other' if only else 'each'} evaluation failed."
        return f"Held-out success {only}; no comparison." if only else "Held-out success was not measured."
    text = f"Held-out success {before} -> {after}"
    if gain is None:
        return text + "."
    points = f"{100 * gain.mean:+.1f} points {gain.bounds('+.1f', times=100)}"
    return f"{text}: {points} on the same {gain.num_episodes} episodes, {verdict_of(gain)}."


def reward_sentences(summary: Summary) -> Iterator[str]:
    """The mean reward before -> after, and what counts as a success; nothing without an evaluation."""
    before, after, gain = summary.reward_before, summary.reward_after, summary.reward_gain
    shown = " -> ".join(interval.plain for interval in (before, after) if interval is not None)
    if shown and summary.success_at is not None:
        change = f": {gain.change}" if gain is not None else ""
        yield f"Mean reward {shown}{change}; a success is a reward of {summary.success_at:g} or more."


def environment_sentences(summary: Summary) -> Iterator[str]:
    """What was learned in each environment of a mixture; nothing without one."""
    for name, found in summary.environments.items():
        yield f"  {name}: {' -> '.join(str(one) for one in (found.before, found.after) if one is not None)}"


def failure_sentences(summary: Summary) -> Iterator[str]:
    """How many episodes of training and of evaluations their environment ended, and for which reasons; nothing without any."""
    for what, num, failures in (
        ("training", summary.accounting.get("submitted", 0), summary.failures),
        ("held-out", summary.num_evaluation_episodes, summary.evaluation_failures),
    ):
        if failures:
            yield f"{sum(failures.values())} of {num} {what} episodes failed: {in_words(failures)}."


def program_sentences(found: Mapping[str, int]) -> Iterator[str]:
    """What an agent program asked for, and what became of it (`Summary.gateway`); nothing without one."""
    if found:
        num = {name: f"{count:,}" for name, count in found.items()}
        turns = sum(found[kind] for kind in ("opened", "continued", "forked", "rewritten"))
        yield (
            f"The program was given {turns:,} turns: {num['forked']} from an earlier one, {num['rewritten']} after it rewrote "
            f"its history ({num['encoded_anew_tokens']} tokens encoded anew). {num['dropped_answers']} answers dropped "
            f"({num['dropped_tokens']} tokens), {num['overridden']} parameters overridden, {num['refused']} requests refused."
        )


def exactness_sentences(summary: Summary) -> Iterator[str]:
    """The three parts of exactness, as far as they were measured (docs/exactness.md); nothing where OLD was not computed."""
    found = [f"weights bit-exact ({summary.num_digests:,} checkouts by digest)"] if summary.num_digests else []
    if summary.consistency_lag0_max_abs_error is not None:
        found.append(f"lag-0 error {summary.consistency_lag0_max_abs_error:.2g}")
    if found and summary.packing_max_abs_error is not None:
        mean, largest = summary.packing_mean_abs_error, summary.packing_max_abs_error
        found.append(f"packing noise {mean:.2g} on average and {largest:.2g} at most, in nats")
    if found:
        yield f"Exactness: {', '.join(found)}."


def staleness_sentence(summary: Summary) -> str:
    """How much was trained, how stale it was, and how the proximal policy's log-probs were obtained."""
    total = sum(summary.provenance.values())
    kinds = ", ".join(f"{count / total:.1%} {kind}" for kind, count in sorted(summary.provenance.items()) if count)
    text = f"{summary.num_trajectories} trajectories, {summary.num_multi_version_trajectories} of several versions"
    if summary.staleness_max is not None and summary.staleness_mean is not None:
        text += f"; staleness mean {summary.staleness_mean:.2f}, max {summary.staleness_max}"
    return text + (f"; proximal log-probs: {kinds}." if kinds else ".")
