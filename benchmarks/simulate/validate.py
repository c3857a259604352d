"""Predicted beside measured: a run, simulated from its own step times, and what it did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

from benchmarks.simulate.fit import MeasuredRun
from benchmarks.simulate.forecast import forecast, mean_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """How far a prediction may be off: as a share of what was measured, or in the figure's own unit."""

    kind: Literal["relative", "absolute"]
    allowed: float


BARS: Final[Mapping[str, Bar]] = MappingProxyType(
    {
        "trajectories_per_s": Bar(kind="relative", allowed=0.15),
        "engine_idle_share": Bar(kind="absolute", allowed=0.05),
        "trainer_idle_share": Bar(kind="absolute", allowed=0.05),
        "staleness_mean": Bar(kind="relative", allowed=0.2),
    }
)
"""The figures that a prediction is judged by."""

SHOWN: Final = (
    *BARS,
    "staleness_max",
    "tokens_per_s",
    "sampled_per_s",
    "update_s",
    "wait_s",
    "score_share",
    "stall_s",
    "reads_per_token",
    "prefill_per_token",
)
"""All figures that a run holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One figure.

    Args:
        name: A field of `Forecast`.
        predicted: Mean over the seeds.
        low: The least of the seeds.
        high: The greatest of the seeds.
        measured: Of the run.
        bar: What is allowed; None: the figure is not judged.
    """

    name: str
    predicted: float
    low: float
    high: float
    measured: float
    bar: Bar | None

    @property
    def error(self) -> float:
        """Predicted less measured; relative to what was measured, unless the bar is absolute."""
        difference = self.predicted - self.measured
        is_absolute = self.bar is not None and self.bar.kind == "absolute"
        return difference if is_absolute or not self.measured else difference / self.measured

    @property
    def passes(self) -> bool | None:
        """Whether the error is allowed; None where it is not judged."""
        return None if self.bar is None else abs(self.error) <= self.bar.allowed


def compare(run: MeasuredRun, *, against: MeasuredRun | None = None, num_seeds: int = 3) -> list[Comparison]:
    """Simulate the recipe of `against` with the step times of `run`, and compare with what `against` did.

    Args:
        run: Gives step times and workload.
        against: Gives recipe and measured figures; None: `run` itself.
        num_seeds: Simulations to take the mean of.
    """
    target = run if against is None else against
    each = [forecast(run.scenario(target.config, seed=seed)) for seed in range(num_seeds)]
    predicted, measured = mean_of(each), target.measured
    return [
        Comparison(
            name=name,
            predicted=getattr(predicted, name),
            low=min(getattr(one, name) for one in each),
            high=max(getattr(one, name) for one in each),
            measured=getattr(measured, name),
            bar=BARS.get(name),
        )
        for name in SHOWN
    ]
