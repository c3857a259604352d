"""``oldlogits bounds``: what a setting means for the total ratio, in numbers and in words."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    band: float = _DEFAULT.fixed_band
    """The discrepancy band [1/band, band], > 1; inf: no band."""
    eps_low: float = _DEFAULT.objective.eps_low
    """The clip of r_s for A < 0 is 1 - eps_low."""
    eps_high: float = _DEFAULT.objective.eps_high
    """The clip of r_s for A > 0 is 1 + eps_high."""
    dual_clip: float = _DEFAULT.objective.dual_clip
    """Upper bound of r_s for A < 0, > 1; inf: none."""


def command(arguments: Sequence[str]) -> int:
    """Print table and words."""
    o = tyro.cli(BoundsOptions, prog="oldlogits bounds", args=list(arguments))
    objective = {key: value for key, value in dataclasses.asdict(o).items() if key != "band"}
    build(RunConfig, {"band": o.band, "objective": objective})  # the ranges are the recipe's
    readings = list(read(o.interpolation_mu, o.band, o.eps_low, o.eps_high, o.dual_clip))
    title = (
        f"interpolation_mu {o.interpolation_mu:g}, band {o.band:g}, eps {o.eps_low:g} / {o.eps_high:g}, "
        f"dual clip {o.dual_clip:g}; R = theta / mu"
    )
    console = Console(highlight=False)
    console.print(Group(Text(title, style="bold"), table(readings), Text(), words(readings)))
    return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """``low <= ratio <= high`` of R, r_d or r_s; 0 and inf where there is no bound."""

    ratio: str
    low: float = 0.0
    high: float = math.inf

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
    """What a setting means for one variant: a token is trained where the mask and its sign's clip both hold.

    Args:
        variant: The name of the variant.
        remark: What to know about it.
        mask: The bounds of the mask.
        clips: The clip of each sign of the advantage.
        heading: The name of its column; empty: it is no column, for it differs from the one before in having no mask.
    """

    variant: str
    remark: str
    mask: Interval
    clips: Mapping[str, Interval]
    heading: str = ""


def read(weight_mu: float, band: float, eps_low: float, eps_high: float, dual_clip: float) -> Iterator[Reading]:
    """Both interpolations, with and without a mask, and the exact old logits beside them."""
    kinds: tuple[Interpolation, ...] = ("linear", "loglinear")
    for kind, heading in zip(kinds, ("linear", "log-linear"), strict=True):
        bounds = effective_bounds(kind, weight_mu=weight_mu, band=band, eps_low=eps_low, eps_high=eps_high, dual_clip=dual_clip)
        mask = Interval(ratio="R", low=bounds.mask_low, high=bounds.mask_high)
        clips = {
            "A > 0": Interval(ratio="R", high=bounds.positive_high),
            "A < 0": Interval(ratio="R", low=bounds.negative_low, high=bounds.negative_high),
        }
        masked, unmasked = "mask and clip both bound R", "r_d = 1, so no mask; mismatch uncorrected"
        yield Reading(variant=f"{kind}_train_infer", remark=masked, mask=mask, clips=clips, heading=heading)
        yield Reading(variant=f"{kind}_prox", remark=unmasked, mask=Interval(ratio="R"), clips=clips)
    yield Reading(
        variant="decoupled_exact",
        remark="mask and clip bound two ratios; R alone does not decide",
        mask=Interval(ratio="r_d", low=1 / band, high=band),
        clips={
            "A > 0": Interval(ratio="r_s", high=1 + eps_high),
            "A < 0": Interval(ratio="r_s", low=max(1 - eps_low, 0.0), high=dual_clip),
        },
        heading="exact",
    )


def table(readings: Sequence[Reading]) -> Table:
    """The bounds in numbers, a column for each variant with a mask."""
    columns = [reading for reading in readings if reading.heading]
    numbers = Table("", *(f"{c.heading}\n{c.variant}" for c in columns), box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    numbers.add_row("mask", *(str(column.mask) for column in columns))
    for sign in ("A > 0", "A < 0"):
        numbers.add_row(f"clip {sign}", *(str(column.clips[sign]) for column in columns))
    return numbers


def words(readings: Iterable[Reading]) -> Text:
    """The bounds in plain words."""
    text = Text()
    for row in readings:
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
