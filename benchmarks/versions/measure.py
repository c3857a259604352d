"""What exact versions cost, held to bars, against a copy, an average and what others do.

synthetic, per learning rate    SyntheticModel -> Lab -> rows
the average                     WeightAverage against a copy of the masters
real, per learning rate         SmolLM2 -> Lab -> rows
"""

from __future__ import annotations

import gc
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import torch

from benchmarks.machine import this_machine
from benchmarks.versions.bars import ANY, DEMO, FAST, GPU_PARAMS, MIDDLE, SLOW
from benchmarks.versions.lab import WALK, ComparedLab
from benchmarks.versions.rows import Report, Row, Seconds, Steps, Subject
from oldlogits.bench.chains import RealModel, SyntheticModel
from oldlogits.bench.lab import Chain, time_busy
from oldlogits.core.environment import MODELS, ModelOrder
from oldlogits.core.errors import ConfigError
from oldlogits.models.cache import cache_folder
from oldlogits.versions import WeightAverage, kernels_in_use
from order_desk.environment import OrderDesk

SYNTHETIC_LRS: Final = (SLOW, MIDDLE, FAST, DEMO)
REAL_LRS: Final = (SLOW, FAST)

Progress = Callable[[str, int, int], None]
"""Called with what goes on now, the units of work done, and all of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to run.

    Args:
        device: "cpu", "cuda" or "cuda:1".
        num_params: Of the synthetic model.
        num_rounds: Versions at each learning rate, >= 4; from 10 on with a window of 10.
        compare_every: Entropy and XOR + zstd-1 are computed in one round of so many.
        num_steps: Steps of the real model at each learning rate; 0: without it.
        is_smoke: Whether it is the short run.
    """

    device: str = "cpu"
    num_params: int = 128_000_000
    num_rounds: int = 11
    compare_every: int = 3
    num_steps: int = 24
    is_smoke: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        if self.num_rounds < WALK or self.num_params < 100_000 or (0 < self.num_steps < WALK):
            raise ConfigError(
                "too little to measure",
                got=f"{self.num_params:,} parameters, {self.num_rounds} rounds, {self.num_steps} steps",
                allowed=f"at least 100,000 parameters, {WALK} rounds, and 0 or {WALK} steps",
                fix="leave --params out, or raise it",
            )
        if torch.device(self.device).type != "cpu" and not torch.cuda.is_available():
            raise ConfigError("there is no such device", got=self.device, allowed="cpu", fix="leave --device out")

    @classmethod
    def of(cls, *, is_smoke: bool, device: str, num_params: int | None) -> Plan:
        """The usual plans: full or short, on a CPU or an accelerator, where there is no real model.

        Args:
            is_smoke: The short one.
            device: See the class.
            num_params: None: 128 million on a CPU, 4 billion on an accelerator, 24 million in the short run.
        """
        on_cpu = torch.device(device).type == "cpu"
        usual = 24_000_000 if is_smoke else 128_000_000 if on_cpu else GPU_PARAMS
        return cls(
            device=device,
            num_params=num_params or usual,
            num_rounds=10 if is_smoke else 11,
            compare_every=10 if is_smoke or not on_cpu else 3,
            num_steps=0 if is_smoke or not on_cpu else 24,
            is_smoke=is_smoke,
        )

    @property
    def total(self) -> int:
        """Units of work: rounds and steps of all learning rates."""
        return len(SYNTHETIC_LRS) * self.num_rounds + self.num_rounds + len(REAL_LRS) * self.num_steps


def measure(plan: Plan, progress: Progress = lambda doing, done, total: None) -> Report:
    """Run everything, on one thread.

    Raises:
        ModelFolderError: The real model cannot be had.
    """
    started, bench = time.perf_counter(), _Bench(plan, progress)
    machine = this_machine(plan.device, kernels_in_use())
    with _one_thread():
        for lr in SYNTHETIC_LRS:
            bench.synthetic(lr)
        bench.average()
        for lr in REAL_LRS if plan.num_steps else ():
            bench.real(lr)
    return Report(
        machine=machine,
        is_smoke=plan.is_smoke,
        took_s=time.perf_counter() - started,
        rows=tuple(bench.rows),
        steps=tuple(bench.steps),
    )


class _Bench:
    """The parts of a run, and what they found."""

    def __init__(self, plan: Plan, progress: Progress) -> None:
        self._plan, self._progress, self._done = plan, progress, 0
        self._model: Final = "synthetic" if torch.device(plan.device).type == "cpu" else "gpu"
        self.rows: list[Row] = []
        self.steps: list[Steps] = []

    def synthetic(self, lr: float) -> None:
        """A chain of the random model."""
        plan = self._plan
        source = SyntheticModel(num_params=plan.num_params, lr=lr, device=plan.device)
        subject = Subject(model=self._model, lr=lr, num_params=sum(master.numel() for master in source.masters.values()))
        self._chain(source, subject, plan.num_rounds)

    def real(self, lr: float) -> None:
        """A chain of the real model."""
        self._progress(f"SmolLM2 at lr {lr:g}", self._done, self._plan.total)
        order = ModelOrder(seed=0, steps=0, environment=OrderDesk, parser="hermes", cache=cache_folder())
        source = RealModel(MODELS.find("smollm2")(order), lr=lr)
        num_params = sum(master.numel() for master in source.masters.values())
        subject = Subject(model="smollm2", lr=lr, num_params=num_params)
        self._chain(source, subject, self._plan.num_steps)

    def _chain(self, source: Chain, subject: Subject, num_rounds: int) -> None:
        gc.collect()  # the chain before, whose optimizer and module are cycles
        lab = ComparedLab(source, subject, compare_every=self._plan.compare_every)
        for _ in range(num_rounds):
            self._advance(f"{subject.model} at lr {subject.lr:g}")
            lab.round()
        self.rows += lab.rows()
        changed, cold = tuple(lab.values["share.changed"]), tuple(lab.values["bytes.cold"])
        self.steps.append(Steps(model=subject.model, lr=subject.lr, shares=changed, cold=cold))

    def average(self) -> None:
        """The update of the weight average, against a copy of the masters."""
        masters = SyntheticModel(num_params=self._plan.num_params, lr=SLOW, device=self._plan.device).masters
        average, copy = WeightAverage(masters), {name: torch.empty_like(master) for name, master in masters.items()}
        device, times = torch.device(self._plan.device), defaultdict[str, list[Seconds]](list)

        def timed(name: str, work: Callable[[], object]) -> None:
            started = time.perf_counter()
            _, busy_s = time_busy(work, device)
            times[name].append(Seconds(busy_s=busy_s, wall_s=time.perf_counter() - started))

        def copied() -> None:
            for name, master in masters.items():
                copy[name].copy_(master)

        copied()
        for _ in range(self._plan.num_rounds):
            self._advance("the weight average")
            timed("copy", copied)
            timed("add", lambda: average.add(masters, 0.8))
        subject = Subject(model=self._model, lr=ANY, num_params=average.num_bytes // 4)
        self.rows += [subject.ratios("ewma", times["add"], times["copy"]), subject.milliseconds("ms.ewma", times["add"])]

    def _advance(self, doing: str) -> None:
        self._progress(doing, self._done, self._plan.total)
        self._done += 1


@contextmanager
def _one_thread() -> Iterator[None]:
    """Torch works on one thread inside."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
