"""The guard at the door: a correction that can never act is refused, and a doubtful recipe is warned of with figures.

An interpolated proximal policy turns band and clip into bounds on the total ratio ``R = theta / mu`` (config/bounds.py); a
bound of 0 or inf does not exist. Each rule with its figures: docs/guard.md. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from oldlogits.config.bounds import EffectiveBounds, Interpolation, a3po_weight, effective_bounds, supremum_r_s
from oldlogits.config.schema import RunConfig
from oldlogits.core.errors import ConfigError
from oldlogits.core.loss import card_of
from oldlogits.core.policies import AGED, ASYNC, EWMA, LINEAR, LOGLINEAR, OLD, RESCORE, Policy, find_variant


@dataclass(frozen=True, slots=True, kw_only=True)
class Caution:
    """Something that a reader of the results should know.

    Args:
        name: The rule's name, for programs.
        message: What, with its figures and a remedy.
        figures: The figures again, by name.
    """

    name: str
    message: str
    figures: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Weighted:
    """An interpolation at one weight on mu: under a schedule at one staleness, else at all of them (None)."""

    staleness: int | None
    weight_mu: float
    bounds: EffectiveBounds

    @property
    def where(self) -> str:
        return f"interpolation_mu {self.weight_mu:g}" if self.staleness is None else f"staleness {self.staleness}"

    @property
    def has_mask(self) -> bool:
        return self.bounds.mask_low > 0 or self.bounds.mask_high < math.inf


def refuse_idle(config: RunConfig) -> None:
    """Refuse a correction that can never act because its bound does not exist.

    What another loss makes of the bounds is not known here, so that it is neither refused nor warned of.

    Raises:
        ConfigError: A clip or the mask has no bound, though the recipe does not switch it off.
    """
    if not card_of(config.objective.loss).is_guarded:
        return
    masks = not find_variant(config.variant).r_d.is_one
    has_mask = config.band == "auto" or config.band < math.inf or config.correction.masks
    if masks and not has_mask and config.objective.mismatch_correction == "mask":
        raise ConfigError(
            "r_d is to mask and not to weight, and without a band it does neither",
            got="band = inf, objective.mismatch_correction = 'mask'",
            allowed="a finite band, or objective.mismatch_correction = 'weight_and_mask': importance weights without a mask",
            fix="set band = 1.5",
        )
    weighted = list(_weighted(config))
    for one in weighted:
        if config.objective.clip == "ppo":
            _refuse_missing_clip(config, one)
        else:
            _refuse_missing_truncation(config, one)
    has_band = config.fixed_band < math.inf
    if masks and weighted and all(one.weight_mu == 1 or (has_band and not one.has_mask) for one in weighted):
        scheduled = config.objective.interpolation_schedule != "fixed"
        raise ConfigError(
            f"variant '{config.variant}' masks nothing at any weight of this recipe: its proximal policy is MU and r_d is 1",
            got=", ".join(one.where for one in weighted),
            allowed="a max_staleness (lockstep: lockstep.max_lag) of 2 or more"
            if scheduled
            else "objective.interpolation_mu < 1",
            fix="use variant 'ppo_clip_train_infer', which claims no mask, or "
            + ("a larger max_staleness" if scheduled else "objective.interpolation_mu = 0.5"),
        )


def _refuse_missing_clip(config: RunConfig, at: _Weighted) -> None:
    """Refuse an interpolation without an upper clip for A > 0 or without a lower one for A < 0."""
    exists = {"A > 0": at.bounds.positive_high < math.inf, "A < 0": at.bounds.negative_low > 0}
    missing = [sign for sign, found in exists.items() if not found]
    if not missing:
        return
    linear, eps_high = _kind(config) == "linear", config.objective.eps_high
    least = eps_high / (1 + eps_high)
    remedies = _more_weight(config) + (["a smaller objective.eps_high"] if linear else [])
    raise ConfigError(
        f"variant '{config.variant}' has no clip for {' and '.join(missing)} at {at.where}: r_s is 1 or cannot reach the bound",
        got=f"a weight on mu of {at.weight_mu:g}, objective.eps_high = {eps_high:g}",
        allowed=f"a weight on mu above eps_high / (1 + eps_high) = {least:.4g}" if linear else "a weight on mu well above 0",
        fix="use " + ", or ".join(remedies),
    )


def _refuse_missing_truncation(config: RunConfig, at: _Weighted) -> None:
    """Refuse a truncation that r_s of an interpolation cannot exceed; an infinite one truncates nothing on purpose."""
    truncation, largest = config.objective.is_cap, supremum_r_s(_kind(config), weight_mu=at.weight_mu)
    if not largest <= truncation < math.inf:
        return
    remedies = _more_weight(config) + (["a smaller objective.is_cap"] if largest > 1 else [])
    raise ConfigError(
        f"variant '{config.variant}' has nothing to truncate at {at.where}: r_s "
        + (f"stays below 1 / (1 - weight on mu) = {largest:.4g}" if largest > 1 else "is 1"),
        got=f"a weight on mu of {at.weight_mu:g}, objective.clip = 'truncated', objective.is_cap = {truncation:g}",
        allowed=(f"a truncation below {largest:.4g}" if largest > 1 else "a weight on mu above 0") + ", or inf: none",
        fix="use " + ", or ".join(remedies),
    )


def _more_weight(config: RunConfig) -> list[str]:
    """What moves a proximal policy away from THETA, or lets its r_s grow without bound."""
    weight = (
        "a larger objective.interpolation_mu"
        if config.objective.interpolation_schedule == "fixed"
        else "a smaller max_staleness"
    )
    linear = _kind(config) == "linear"
    return [weight, f"variant '{config.variant.replace('linear', 'loglinear')}'"] if linear else [weight]


def cautions(config: RunConfig) -> tuple[Caution, ...]:
    """What the recipe alone shows to be doubtful, if these rules are about its loss."""
    if not card_of(config.objective.loss).is_guarded:
        return ()
    variant, steps = find_variant(config.variant), config.trainer.minibatches_per_update
    found: list[Caution] = []
    if config.objective.clip == "ppo" and steps == 1 and _starts_at_theta(variant.proximal, config):
        message = (
            f"no clip acts: with trainer.minibatches_per_update = 1 THETA is {variant.proximal.name} at the only step, "
            "so r_s = 1 and the clip masks 0 tokens; two steps or more give it something to do"
        )
        found.append(Caution(name="no-clip", message=message, figures={"minibatches_per_update": steps, "clipped": 0}))
    bounds_r_d = config.correction.masks or config.correction.weight_high < math.inf
    if config.band == math.inf and not variant.r_d.is_one and not bounds_r_d:
        message = "no mask: band = inf, so r_d only weights, however large it is; set band = 1.5 for a mask"
        found.append(Caution(name="no-band", message=message, figures={"band": config.fixed_band}))
    return (*found, *_hidden_bounds(config))


def _starts_at_theta(proximal: Policy, config: RunConfig) -> bool:
    """Whether the proximal policy is THETA before the first step: ASYNC always, and others where no token can be stale.

    With a window of 0 AGED moves by a lag of 0, RESCORE takes out the very noise that MU has, and every decay but a fixed one
    is 0, so that EWMA is the live weights.
    """
    if proximal is EWMA:
        return config.window == 0 and config.proximal.decay != "fixed"
    return proximal is ASYNC or (config.window == 0 and proximal in (OLD, RESCORE, AGED))


def _hidden_bounds(config: RunConfig) -> Iterator[Caution]:
    """Bounds of an interpolation that do not exist on one side, or that lie beyond the mask's."""
    if config.fixed_band == math.inf or find_variant(config.variant).r_d.is_one:
        return
    clips, weighted = config.objective.clip == "ppo", list(_weighted(config))
    hidden = [(names, list(found)) for names, found in groupby(weighted, lambda one: _hidden(one.bounds, clips)) if names]
    if hidden:
        shown = next((one for one in weighted if one.has_mask), weighted[0])
        bounds = shown.bounds
        figures = f"{shown.where}: mask {bounds.mask_low:.3g} <= R <= {bounds.mask_high:.3g}"
        figures += f", clip {bounds.negative_low:.3g} <= R <= {bounds.positive_high:.3g}" if clips else ""
        yield Caution(
            name="hidden-bounds",
            message=f"bounds of {config.variant} that never act, at band {config.fixed_band:g}: "
            + "; ".join(f"{_range(found)}: {', '.join(names)}" for names, found in hidden)
            + f" ({figures}; oldlogits bounds)",
            figures={
                "mask_low": bounds.mask_low,
                "mask_high": bounds.mask_high,
                "negative_low": bounds.negative_low,
                "positive_high": bounds.positive_high,
            },
        )


def _range(found: Sequence[_Weighted]) -> str:
    first, last = found[0], found[-1]
    return first.where if first is last else f"{first.where} to {last.staleness}"


def _hidden(bounds: EffectiveBounds, clips: bool) -> tuple[str, ...]:
    low, high = bounds.mask_low > 0, bounds.mask_high < math.inf
    found = {
        "mask": not low and not high,
        "mask from below": not low and high,
        "mask from above": low and not high,
        "clip of A > 0": clips and bounds.positive_high >= bounds.mask_high,
        "clip of A < 0": clips and bounds.negative_low <= bounds.mask_low,
    }
    return tuple(name for name, is_hidden in found.items() if is_hidden)


def kept_at_lag_0(config: RunConfig) -> tuple[float, float]:
    """The ``R = old / mu`` that the mask keeps where nothing is stale and nothing learned, both ends included.

    There THETA is OLD, and so is every proximal policy that is no interpolation: the band itself.
    0 and inf: there is no mask, or its band is measured.
    """
    if find_variant(config.variant).r_d.is_one:
        return 0.0, math.inf
    for one in _weighted(config):  # the first is that of staleness 0
        return one.bounds.mask_low, one.bounds.mask_high
    return 1 / config.fixed_band, config.fixed_band


def _weighted(config: RunConfig) -> Iterator[_Weighted]:
    """The bounds on R by the weight on mu, staleness ascending; nothing where the proximal policy is no interpolation."""
    variant, objective = find_variant(config.variant), config.objective
    if variant.proximal not in (LINEAR, LOGLINEAR):
        return
    fixed = objective.interpolation_schedule == "fixed"
    for staleness in [None] if fixed else range(config.window + 1):
        weight_mu = objective.interpolation_mu if staleness is None else a3po_weight(staleness)
        bounds = effective_bounds(
            _kind(config),
            weight_mu=weight_mu,
            band=math.inf if variant.r_d.is_one else config.fixed_band,
            eps_low=objective.eps_low,
            eps_high=objective.eps_high,
            dual_clip=objective.dual_clip,
        )
        yield _Weighted(staleness=staleness, weight_mu=weight_mu, bounds=bounds)


def _kind(config: RunConfig) -> Interpolation:
    return "linear" if find_variant(config.variant).proximal is LINEAR else "loglinear"
