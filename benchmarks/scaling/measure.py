"""Trajectories per second of k rollout workers, where what takes time is the environments.

    recipe (k workers, k times the groups) --> oldlogits train, a process group of its own
    events.jsonl  <-- read as it grows: the end of the second update .. that of the last, by this process's clock
    /proc/stat    <-- at both: the share of all cores that were busy

Every run has the same work for each worker: groups of episodes at the desk with slow tools, a batch of as many groups as run
at the same time, so that an update takes as long with k workers as with one as long as nothing but latency counts.
"""

from __future__ import annotations

import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Literal

import tomli_w

from benchmarks.machine import Machine, this_machine
from oldlogits.core.errors import ConfigError, WorkerDiedError
from oldlogits.record.event_log import read_events, typed
from oldlogits.record.events import Updated
from order_desk.environment import OrderDesk

Runtime = Literal["local", "ray"]

LEAST_SCALING: Final = 0.8
"""Bar: of k times the trajectories per second of one worker."""
LEAST_OF_LOCAL: Final = 0.9
"""Bar: of the trajectories per second of runtime "local", for Ray with one worker."""
MOST_CPU_SHARE: Final = 0.8
"""Of all cores; where more is busy the bars do not hold, since the latency is no longer what counts."""
NUM_WARM_UP: Final = 2
"""First updates of a run, which are not measured: they compile, and fill what runs."""
NUM_ROWS: Final = 512
"""Tasks, the same for every run."""
POLL_S: Final = 0.2
"""Seconds between two looks at the events of a run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What each worker does.

    Args:
        latency_s: Mean seconds of a tool call.
        groups: Groups of episodes that run at the same time, for each worker.
        group_size: Episodes of a group.
        num_updates: Updates that are measured.
        timeout_s: Seconds that a whole run may take.
    """

    latency_s: float = 1.5
    groups: int = 4
    group_size: int = 2
    num_updates: int = 8
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        """Refuse what is no work."""
        if not (self.latency_s > 0 and self.timeout_s > 0) or min(self.groups, self.num_updates) < 1 or self.group_size < 2:
            raise ConfigError(
                "the workload of the bench is out of range",
                got=str(self),
                allowed="latency_s, timeout_s > 0; groups, num_updates >= 1; group_size >= 2",
                fix="correct the option",
            )

    def recipe(self, setting: Setting, rows: Path, seed: int) -> dict[str, object]:
        """The recipe of a run; steps are so small that the agent stays what it is."""
        groups = self.groups * setting.workers
        recipe: dict[str, object] = {
            "seed": seed,
            "num_updates": NUM_WARM_UP + self.num_updates,
            "model": {"path": "tiny", "seed": 0},
            "env": {"target": "desk_slow", "train_data": str(rows), "timeout_s": max(20.0, 20 * self.latency_s)},
            "rollout": {"group_size": self.group_size, "prompts_per_update": groups, "max_running_groups": groups},
            "trainer": {"lr": 1e-7, "minibatches_per_update": 1},
            "runtime": {"type": setting.runtime},
            "eval": {"num_episodes": 0, "num_calibration": 0},
            "record": {"tokens_every": 0, "transcripts_every": 0, "checkpoint_every": 0},
        }
        return recipe if setting.runtime == "local" else {**recipe, "ray": {"num_workers": setting.workers}}


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Setting:
    """Who does the work: a runtime and how many rollout workers it has."""

    runtime: Runtime
    workers: int

    def __str__(self) -> str:
        """As in "local" or "ray, 4 workers"."""
        return self.runtime if self.runtime == "local" else f"ray, {self.workers} worker{'s' * (self.workers > 1)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One run.

    Args:
        setting: Who did the work.
        trajectories_per_s: Trajectories that ended while it was measured, trained or not yet, by its seconds.
        cpu_share: Of all cores of the machine that were busy in that time, with whatever; nan where the system does not tell.
        staleness_mean: Of the trained tokens in that time, in versions.
        seconds_s: That time.
    """

    setting: Setting
    trajectories_per_s: float
    cpu_share: float
    staleness_mean: float
    seconds_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The runs of a setting, against what they are compared with.

    Args:
        setting: Who did the work.
        rates: Trajectories per second of each run.
        cpu_share: Mean of the runs.
        staleness_mean: Mean of the runs.
        share: Median rate / (workers x the median of Ray with one worker); of that one: / the median of "local"; nan without
            what it is compared with.
        bar: The least that `share` may be; None: none holds.
    """

    setting: Setting
    rates: tuple[float, ...]
    cpu_share: float
    staleness_mean: float
    share: float
    bar: float | None

    @property
    def is_met(self) -> bool | None:
        """Whether the bar is met; None where none holds."""
        return None if self.bar is None else self.share >= self.bar


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What was measured, and on what."""

    machine: Machine
    workload: Workload
    runs: tuple[Measured, ...]

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """A verdict for each setting, "local" first, then by the number of workers."""
        return tuple(self._verdict(setting) for setting in sorted({run.setting for run in self.runs}))

    def _verdict(self, setting: Setting) -> Verdict:
        runs = [run for run in self.runs if run.setting == setting]
        cpu_share = statistics.fmean(run.cpu_share for run in runs)
        base = Setting(runtime="local", workers=1) if setting.workers == 1 else Setting(runtime="ray", workers=1)
        share = self._rate(setting) / (setting.workers * self._rate(base))
        is_compared = setting != base and not math.isnan(share)
        is_held = is_compared and not cpu_share >= MOST_CPU_SHARE  # also where the system does not tell the CPU's share
        return Verdict(
            setting=setting,
            rates=tuple(run.trajectories_per_s for run in runs),
            cpu_share=cpu_share,
            staleness_mean=statistics.fmean(run.staleness_mean for run in runs),
            share=share,
            bar=(LEAST_OF_LOCAL if setting.workers == 1 else LEAST_SCALING) if is_held else None,
        )

    def _rate(self, setting: Setting) -> float:
        rates = [run.trajectories_per_s for run in self.runs if run.setting == setting]
        return statistics.median(rates) if rates else math.nan

    def write(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Report:
        """What `write` wrote."""
        found = json.loads(path.read_text(encoding="utf-8"))
        machine = {**found["machine"], "features": tuple(found["machine"]["features"])}
        runs = tuple(Measured(**{**run, "setting": Setting(**run["setting"])}) for run in found["runs"])
        return cls(machine=Machine(**machine), workload=Workload(**found["workload"]), runs=runs)


def settings(workers: Sequence[int], rounds: int) -> list[Setting]:
    """Every run in order: "local" and Ray with one worker take turns, `rounds` times, then the other numbers of workers once.

    Raises:
        ConfigError: No round, or a number of workers below 1.
    """
    if rounds < 1 or min(workers, default=1) < 1:
        raise ConfigError(
            "the bench has nothing to run", got=f"{rounds} rounds, workers {list(workers)}", allowed=">= 1", fix="raise it"
        )
    pair = [Setting(runtime="local", workers=1)] + [Setting(runtime="ray", workers=1)] * (1 in workers)
    return pair * rounds + [Setting(runtime="ray", workers=k) for k in sorted(set(workers) - {1})]


def measure(workload: Workload, order: Sequence[Setting], folder: Path, on_start: Callable[[int, Setting], None]) -> Report:
    """Run every setting in turn.

    Args:
        workload: Of each worker.
        order: The runs.
        folder: Gets the rows, and recipe, messages and run folder of each run.
        on_start: Called with the number of each run, from 0.

    Raises:
        WorkerDiedError: A run failed or took too long.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = folder / "rows.jsonl"
    made = ({**OrderDesk.make_row("train", i), "latency_s": workload.latency_s} for i in range(NUM_ROWS))
    rows.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    machine, runs = this_machine("cpu", fast_path="not used"), []
    for number, setting in enumerate(order):
        on_start(number, setting)
        recipe = folder / f"{number:02d}-{setting.runtime}-{setting.workers}.toml"
        seed = order[:number].count(setting)  # runs that are compared with each other have the same tasks
        recipe.write_text(tomli_w.dumps(workload.recipe(setting, rows, seed=seed)), encoding="utf-8")
        runs.append(_watch(setting, recipe, workload))
    return Report(machine=machine, workload=workload, runs=tuple(runs))


def _watch(setting: Setting, recipe: Path, workload: Workload) -> Measured:
    """Run a recipe to its end, and read the clocks when the warm-up is done and at the last update."""
    out, log = recipe.with_suffix(""), recipe.with_suffix(".log")
    command = [sys.executable, "-m", "oldlogits", "train", str(recipe), "--out", str(out)]
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    with log.open("w", encoding="utf-8") as file:
        run = subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, **threads}, start_new_session=True)
        try:
            ends = time.monotonic() + workload.timeout_s
            first = _reading_at(NUM_WARM_UP, run, out, ends)
            last = _reading_at(NUM_WARM_UP + workload.num_updates, run, out, ends)
            status = run.wait(max(1.0, ends - time.monotonic()))
        except (TimeoutError, subprocess.TimeoutExpired) as error:
            raise _failed(setting, f"no end after {workload.timeout_s:g} s", log) from error
        finally:
            _end(run)
    if first is None or last is None or status != 0:
        raise _failed(setting, f"exit status {run.returncode}", log)
    updates = typed(read_events(out / "events.jsonl"), Updated)[NUM_WARM_UP - 1 :]
    seconds_s = last.at_s - first.at_s
    return Measured(
        setting=setting,
        trajectories_per_s=(_num_ended(updates[-1]) - _num_ended(updates[0])) / seconds_s,
        cpu_share=last.cpu.share_since(first.cpu),
        staleness_mean=statistics.fmean(event.metrics["staleness/mean"] for event in updates[1:]),
        seconds_s=seconds_s,
    )


def _failed(setting: Setting, got: str, log: Path) -> WorkerDiedError:
    words = " ".join(log.read_text(encoding="utf-8", errors="replace")[-800:].split())
    return WorkerDiedError(
        f"a run of the bench failed ({setting})",
        got=f"{got}: {words}",
        allowed="a run that ends by itself",
        fix=f"see {log}; for runs that are slow only, raise --workload.timeout-s",
    )


def _end(run: subprocess.Popen[bytes]) -> None:
    """Leave no process of a run: Ctrl-C first, which puts away what it has started, then the hard way."""
    for number, patience_s in ((signal.SIGINT, 20.0), (signal.SIGKILL, None)):
        if run.poll() is not None:
            return
        os.killpg(run.pid, number)
        try:
            run.wait(patience_s)
        except subprocess.TimeoutExpired:
            continue


@dataclass(frozen=True, slots=True, kw_only=True)
class Cpu:
    """Seconds of all cores, times the clock ticks of the system, since it was started."""

    busy: int
    total: int

    def share_since(self, before: Cpu) -> float:
        """Busy share of the time between two readings; nan without a reading."""
        return (self.busy - before.busy) / (self.total - before.total) if self.total > before.total else math.nan


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """The clocks at one moment."""

    at_s: float
    cpu: Cpu


def _reading_at(num_updates: int, run: subprocess.Popen[bytes], out: Path, ends: float) -> Reading | None:
    """The clocks when a run has made so many updates; None: it ended before.

    Raises:
        TimeoutError: It takes too long.
    """
    path = out / "events.jsonl"
    while True:
        ended = run.poll() is not None  # before the events are read: the last ones are written before the end
        if path.exists() and len(typed(read_events(path), Updated)) >= num_updates:
            return Reading(at_s=time.monotonic(), cpu=read_cpu(Path("/proc/stat")))
        if ended:
            return None
        if time.monotonic() > ends:
            raise TimeoutError
        time.sleep(POLL_S)


def read_cpu(stat: Path) -> Cpu:
    """The first line of Linux's /proc/stat: user, nice, system, idle, iowait, ...; zeros where there is no such file."""
    if not stat.is_file():
        return Cpu(busy=0, total=0)
    ticks = [int(word) for word in stat.read_text(encoding="ascii").partition("\n")[0].split()[1:9]]
    return Cpu(busy=sum(ticks) - ticks[3] - ticks[4], total=sum(ticks))


def _num_ended(update: Updated) -> float:
    """Trajectories that have ended: a batch that waits for the trainer was made, too."""
    return update.metrics["accounting/submitted"] - update.metrics["queue/running"]
