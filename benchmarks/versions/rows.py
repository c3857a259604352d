"""The results: one row a quantity, model and learning rate, with its spread and its bar."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from benchmarks.machine import Machine
from benchmarks.versions.bars import BY_NAME, Model, Quantity


@dataclass(frozen=True, slots=True, kw_only=True)
class Seconds:
    """How long a piece of work took. `busy_s`: CPU time of the calling thread, or an accelerator's time between two events."""

    busy_s: float
    wall_s: float

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(busy_s=self.busy_s + other.busy_s, wall_s=self.wall_s + other.wall_s)

    def __sub__(self, other: Seconds) -> Seconds:
        return Seconds(busy_s=self.busy_s - other.busy_s, wall_s=self.wall_s - other.wall_s)

    def __mul__(self, factor: float) -> Seconds:
        return Seconds(busy_s=self.busy_s * factor, wall_s=self.wall_s * factor)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A median over the versions of one run.

    Args:
        quantity: A name of `bars.QUANTITIES`.
        model: What was measured.
        lr: Learning rate that made the versions, or `bars.ANY`.
        median: In the quantity's unit.
        low: First quartile.
        high: Third quartile.
        wall: The median in wall time; None for what is no time.
        num_samples: Values that the median is of.
        num_params: Values of the model.
        bar: The most that is allowed; None where there is no bar.
    """

    quantity: str
    model: Model
    lr: float
    median: float
    low: float
    high: float
    wall: float | None
    num_samples: int
    num_params: int
    bar: float | None

    @property
    def is_met(self) -> bool | None:
        """Whether the bar is met; None without one."""
        return None if self.bar is None else self.median <= self.bar

    @property
    def of(self) -> Quantity:
        """What it is a figure of."""
        return BY_NAME[self.quantity]


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What rows are about.

    Args:
        model: Which model.
        lr: Learning rate that made the versions, or `bars.ANY`.
        num_params: Values of the model.
    """

    model: Model
    lr: float
    num_params: int

    def row(self, quantity: str, values: Sequence[float], walls: Sequence[float] = ()) -> Row:
        """The row of the values that were measured.

        Args:
            quantity: A name of `bars.QUANTITIES`.
            values: At least one; times are of the busy thread or device.
            walls: The same in wall time.

        Example:
            Values 1, 2, 3, 4, 10: median 3, quartiles 2 and 4.
        """
        low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0],) * 3
        return Row(
            quantity=quantity,
            model=self.model,
            lr=self.lr,
            median=median,
            low=low,
            high=high,
            wall=statistics.median(walls) if walls else None,
            num_samples=len(values),
            num_params=self.num_params,
            bar=BY_NAME[quantity].bar(self.model, self.lr, self.num_params),
        )

    def ratios(self, quantity: str, works: Sequence[Seconds], per: Sequence[Seconds]) -> Row:
        """The row of ratios of times, each of two works of the same round."""
        pairs = list(zip(works, per, strict=True))
        walls = [work.wall_s / unit.wall_s for work, unit in pairs]
        return self.row(quantity, [work.busy_s / unit.busy_s for work, unit in pairs], walls)

    def milliseconds(self, quantity: str, works: Sequence[Seconds]) -> Row:
        """The row of times."""
        return self.row(quantity, [1000 * work.busy_s for work in works], [1000 * work.wall_s for work in works])


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """A chain, step by step.

    Args:
        model: Which model.
        lr: Learning rate.
        shares: Of the values, those that changed, per step.
        cold: Bytes of the cold tier / bytes of a copy, per step.
    """

    model: Model
    lr: float
    shares: tuple[float, ...]
    cold: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All that a run of the bench says.

    Args:
        machine: What it ran on.
        is_smoke: Whether it was the short one, whose figures are of a smaller model and few rounds.
        took_s: Wall time of the run, in seconds.
        rows: The figures.
        steps: The chains.
    """

    machine: Machine
    is_smoke: bool
    took_s: float
    rows: tuple[Row, ...]
    steps: tuple[Steps, ...]

    @property
    def missed(self) -> tuple[Row, ...]:
        """The figures that do not meet their bar."""
        return tuple(row for row in self.rows if row.is_met is False)

    def write(self, path: Path) -> None:
        """Write it as JSON; each row also says its unit, its label and whether its bar is met."""
        rows = [asdict(row) | {"unit": row.of.unit, "label": row.of.label, "is_met": row.is_met} for row in self.rows]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self) | {"rows": rows}, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Report:
        """The report that `write` wrote."""
        content = json.loads(path.read_text(encoding="utf-8"))
        machine = content["machine"] | {"features": tuple(content["machine"]["features"])}
        rows = ({field.name: row[field.name] for field in fields(Row)} for row in content["rows"])
        steps = (step | {"shares": tuple(step["shares"]), "cold": tuple(step["cold"])} for step in content["steps"])
        return cls(
            machine=Machine(**machine),
            is_smoke=content["is_smoke"],
            took_s=content["took_s"],
            rows=tuple(Row(**row) for row in rows),
            steps=tuple(Steps(**step) for step in steps),
        )
