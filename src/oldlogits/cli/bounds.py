"""``oldlogits bounds``: what a setting means for the total ratio, in numbers, as a picture and in words."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import tyro
from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from oldlogits.config.bounds import Interpolation, effective_bounds
from oldlogits.config.reader import build
from oldlogits.config.schema import RunConfig

_DEFAULT: Final = RunConfig()


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundsOptions:
    """Print what a setting means for the total ratio R = theta / mu of a token.

    What a band masks of an engine's own noise is measured when a run starts, and printed by `oldlogits train`.
    """

    interpolation_mu: float = _DEFAULT.objective.interpolation_mu
    """The weight on MU of the linear and the log-linear proximal policy, in [0, 1]."""
    band: float = _DEFAULT.band
    """The discrepancy band [1/band, band], > 1; inf: no band."""
    eps_low: float = _DEFAULT.objective.eps_low
    """The clip of r_s for A < 0 is 1 - eps_low."""
    eps_high: float = _DEFAULT.objective.eps_high
    """The clip of r_s for A > 0 is 1 + eps_high."""
    dual_clip: float = _DEFAULT.objective.dual_clip
    """Upper bound of r_s for A < 0, > 1; inf: none."""


def command(arguments: Sequence[str]) -> int:
    """Print table, picture and words."""
    o = tyro.cli(BoundsOptions, prog="oldlogits bounds", args=list(arguments))
    objective = {key: value for key, value in dataclasses.asdict(o).items() if key != "band"}
    build(RunConfig, {"band": o.band, "objective": objective})  # the ranges are the recipe's
    readings = read(o.interpolation_mu, o.band, o.eps_low, o.eps_high, o.dual_clip)
    title = (
        f"interpolation_mu {o.interpolation_mu:g}, band {o.band:g}, eps {o.eps_low:g} / {o.eps_high:g}, "
        f"dual clip {o.dual_clip:g}; R = theta / mu"
    )
    console = Console(highlight=False)
    console.print(Group(Text(title, style="bold"), table(readings), Text(), picture(readings), Text(), words(readings)))
    return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """``low <= ratio <= high`` of R, r_d or r_s; 0 and inf where there is no bound."""

    ratio: str
    low: float = 0.0
    high: float = math.inf

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high

    def __and__(self, other: Interval) -> Interval:
        """Where both hold, of one ratio."""
        return Interval(ratio=self.ratio, low=max(self.low, other.low), high=min(self.high, other.high))

    def __str__(self) -> str:
        """``0.8 <= R <= 1.28``, to three digits."""
        if self.is_unbounded:
            return f"any {self.ratio}"
        if self.high == math.inf:
            return f"{self.ratio} >= {self.low:.3g}"
        return (f"{self.low:.3g} <= " if self.low > 0 else "") + f"{self.ratio} <= {self.high:.3g}"

    @property
    def is_unbounded(self) -> bool:
        """Whether every ratio is inside."""
        return self.low == 0 and self.high == math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What a setting means for one variant: a token is trained where the mask and its sign's clip both hold."""

    name: str
    variant: str
    remark: str
    mask: Interval
    clips: Mapping[str, Interval]
    """The clip of each sign of the advantage."""

    @property
    def is_entangled(self) -> bool:
        """Whether mask and clip bound the same ratio."""
        return self.mask.ratio == self.clips["A > 0"].ratio

    def without_mask(self) -> Reading:
        """The row of the same proximal policy with ``r_d = 1``."""
        return dataclasses.replace(
            self,
            variant=self.variant.replace("_train_infer", "_prox"),
            remark="r_d = 1, so no mask; mismatch uncorrected",
            mask=Interval(ratio=self.mask.ratio),
        )


def read(weight_mu: float, band: float, eps_low: float, eps_high: float, dual_clip: float) -> tuple[Reading, ...]:
    """Both interpolations, and the exact old logits beside them.

    Raises:
        ConfigError: A value is out of range.
    """

    def interpolated(kind: Interpolation, name: str) -> Reading:
        bounds = effective_bounds(kind, weight_mu=weight_mu, band=band, eps_low=eps_low, eps_high=eps_high, dual_clip=dual_clip)
        return Reading(
            name=name,
            variant=f"{kind}_train_infer",
            remark="mask and clip both bound R",
            mask=Interval(ratio="R", low=bounds.mask_low, high=bounds.mask_high),
            clips={
                "A > 0": Interval(ratio="R", high=bounds.positive_high),
                "A < 0": Interval(ratio="R", low=bounds.negative_low, high=bounds.negative_high),
            },
        )

    return (
        interpolated("linear", "linear"),
        interpolated("loglinear", "log-linear"),
        Reading(
            name="exact",
            variant="decoupled_exact",
            remark="mask and clip bound two ratios; R alone does not decide",
            mask=Interval(ratio="r_d", low=1 / band, high=band),
            clips={
                "A > 0": Interval(ratio="r_s", high=1 + eps_high),
                "A < 0": Interval(ratio="r_s", low=max(1 - eps_low, 0.0), high=dual_clip),
            },
        ),
    )


def table(readings: Sequence[Reading]) -> Table:
    """The bounds in numbers, a column for each variant."""
    numbers = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    numbers.add_column("")
    for reading in readings:
        numbers.add_column(f"{reading.name}\n{reading.variant}")
    numbers.add_row("mask", *(str(reading.mask) for reading in readings))
    for sign in ("A > 0", "A < 0"):
        numbers.add_row(f"clip {sign}", *(str(reading.clips[sign]) for reading in readings))
    return numbers


def words(readings: Sequence[Reading]) -> Text:
    """The bounds in plain words; after each interpolation its row without a mask."""
    text = Text()
    for reading in readings:
        for row in (reading, reading.without_mask()) if reading.is_entangled else (reading,):
            text.append(row.variant, style="bold")
            text.append(f": {row.remark}\n")
            for sign, clip in row.clips.items():
                text.append(f"  for {sign} a token is {_trained(row.mask, clip)}\n")
    text.rstrip()
    return text


def _trained(mask: Interval, clip: Interval) -> str:
    """When a token is trained, and which of the two never acts."""
    bounds = [mask & clip] if mask.ratio == clip.ratio else [mask, clip]
    binding = " and ".join(str(interval) for interval in bounds if not interval.is_unbounded)
    if not binding:
        return "always trained"
    idle = "" if mask.is_unbounded else {mask: ": the clip never acts", clip: ": the mask never acts"}.get(bounds[0], "")
    return f"trained while {binding}{idle if len(bounds) == 1 else ''}"


_COLUMNS: Final = 57
_HALF: Final = _COLUMNS // 2
_MARKS: Final = {
    (True, True): ("█", "green"),
    (False, True): ("m", "dim"),
    (True, False): ("c", "dim"),
    (False, False): ("x", "dim"),
}
"""(inside the mask, inside the clip): mark and style."""
_TICKS: Final = (1, 0.5, 2, 0.2, 5, 0.1, 10, 0.8, 1.25, 0.9, 1.1, 0.95, 1.05)
"""Labels of the axis; the first ones find room first."""


def picture(readings: Sequence[Reading]) -> Text:
    """Each ratio on one log axis, and what becomes of a token there."""
    step = _reach(readings) / _HALF
    values = [math.exp(step * (column - _HALF)) for column in range(_COLUMNS)]
    text = Text(no_wrap=True)
    last = ""
    for name, ratio, sign, mask, clip in _lines(readings):
        text.append(f"{'' if name == last else name:<11}", style="bold")
        text.append(f"{ratio:<4}{sign:<6}")
        for value in values:
            text.append(*_MARKS[value in mask, value in clip])
        text.append("\n")
        last = name
    text.append(f"{'ratio':>20} {_axis(step)}\n")
    text.append(" " * 21 + "█ trained  m masked by the band  c clipped  x both")
    return text


def _lines(readings: Sequence[Reading]) -> Iterator[tuple[str, str, str, Interval, Interval]]:
    """Name, ratio, sign of the advantage, mask and clip of each line."""
    for reading in readings:
        if not reading.is_entangled:
            yield reading.name, reading.mask.ratio, "any A", reading.mask, Interval(ratio=reading.mask.ratio)
        for sign, clip in reading.clips.items():
            mask = reading.mask if reading.is_entangled else Interval(ratio=clip.ratio)
            yield reading.name, clip.ratio, sign, mask, clip


def _reach(readings: Sequence[Reading]) -> float:
    """Half the axis, in nats: a little beyond the farthest bound, the dual clip's aside."""
    bounds = [b for r in readings for b in (r.mask.low, r.mask.high, r.clips["A > 0"].high, r.clips["A < 0"].low)]
    farthest = max((abs(math.log(bound)) for bound in bounds if 0 < bound < math.inf), default=0.0)
    return min(max(1.2 * farthest, math.log(1.2)), math.log(12))


def _axis(step: float) -> str:
    """The labels below the columns."""
    axis = [" "] * _COLUMNS
    for tick in _TICKS:
        label = f"{tick:g}"
        start = _HALF + round(math.log(tick) / step) - len(label) // 2
        around = slice(max(start - 1, 0), start + len(label) + 1)
        if 0 <= start <= _COLUMNS - len(label) and not "".join(axis[around]).strip():
            axis[start : start + len(label)] = label
    return "".join(axis).rstrip()
