"""What a run looks like in the terminal while it goes on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Final, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
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
from oldlogits.record.intervals import reward_of, success_of
from oldlogits.record.live.health import Forecast, health_line, in_minutes

_ROWS: Final[Mapping[str, Mapping[str, str]]] = {
    "reward": {"reward/mean": "{:.3f}"},
    "success": {"reward/success": "{:.3f}"},
    "active": {"mask/rho": "{:.3f} of the tokens (rho)", "mask/rho_band": "band {:.3f}", "mask/rho_clip": "clip {:.3f}"},
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
            TextColumn("[bold]{task.description}"),
            TextColumn("update {task.completed}/{task.total}"),
            BarColumn(bar_width=None, complete_style="blue"),
            TimeElapsedColumn(),
            TextColumn("elapsed"),
            TextColumn("{task.fields[left]}"),
            console=self._console,
            auto_refresh=False,
            expand=True,
        )
        self._task = self._progress.add_task("starting", total=max(total_updates, 1), left="")
        self._forecast, self._health, self._num_updates = Forecast(total_updates), "", 0
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
            self._updated(event)
        elif isinstance(event, EvaluationProgressed):
            self._phase(self._evaluation)
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

    def _updated(self, event: Updated) -> None:
        """Take in an update: what the health line says is all of this one."""
        self._forecast.updated(event)
        bound = None if self._started is None else self._started.max_staleness
        self._health = health_line(event, max_staleness=bound, num_failed=self._num_failed, num_ended=self._num_ended)
        self.update(event.metrics, version=event.version)
        self._phase("training" if event.version < self._total else "ending")

    def _phase(self, name: str) -> None:
        """Name what the run does now, and how long all that is to come will take."""
        self._progress.update(self._task, description=name, left=in_minutes(self._forecast.left_s))

    @property
    def _evaluation(self) -> str:
        when = "before training" if not self._num_updates else "after training" if self._num_updates >= self._total else ""
        return f"evaluation {when}".strip()

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
        self._forecast.evaluated(event)
        self._phase("training" if self._num_updates < self._total else "ending")
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
        self._num_updates = version
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
        drawn: list[RenderableType] = [self._progress, "", grid]
        if self._health:
            drawn[2:2] = [Text(self._health, style="bold"), ""]
        return Panel(Group(*drawn), title=escape(self._title), title_align="left", border_style="blue")

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
