"""What the trainer made of the tokens: its clip and masks, its advantages and its denominator."""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

from oldlogits.doctor.tokens import Bools, Floats, Tokens
from oldlogits.doctor.verdicts import Verdict, cannot_tell, finding, healthy

_ANY_CLIP: Final = 5.0
"""A factor that no clip or mask in use lets through on the side that it looks at."""

_EXACT: Final = 2e-3
"""Relative difference between loss weights that half precision makes."""


def _log_ratio(tokens: Tokens) -> Floats:
    """The ratio that a clip looks at: over OLD as it was recorded, or else over mu."""
    return tokens.theta - (tokens.old if tokens.has("logp_old") else tokens.mu)


def _slack(tokens: Tokens) -> Floats:
    """Nats by which the recorded ratio may differ from the clipped one: rounding, and r_d where OLD was not recorded."""
    size = np.abs(tokens.theta) + np.abs(tokens.old if tokens.has("logp_old") else tokens.mu)
    unknown = 0.0 if tokens.has("logp_old") else math.log(tokens.settings.band)
    return np.float32(_EXACT + unknown) + size * np.float32(tokens.is_rounded / 256)


def _outside(tokens: Tokens) -> Bools:
    """Tokens that the stated clip must not keep; where none was stated, those that no clip in use keeps."""
    settings, log_ratio = tokens.settings, _log_ratio(tokens)
    high, dual = (1 + settings.eps_high, settings.dual_clip) if settings.stated else (_ANY_CLIP, _ANY_CLIP)
    low = 1 - settings.eps_low if settings.stated else 1 / _ANY_CLIP
    floor = math.log(low) if low > 0 else -math.inf
    slack = _slack(tokens)
    falls = (log_ratio < floor - slack) | (log_ratio > math.log(dual) + slack)
    return np.where(tokens.advantage > 0, log_ratio > math.log(high) + slack, (tokens.advantage < 0) & falls).astype(np.bool_)


def clip_never_acts(tokens: Tokens) -> Verdict:
    """A clip or mask that keeps every token, those far outside of it too."""
    outside = _outside(tokens)
    if not tokens.kept.all():
        return healthy(f"clip and masks drop {1 - tokens.kept.mean():.2%} of the loss tokens", tokens)
    if not outside.any():
        return healthy("clip and masks keep every token, and none is outside of them", tokens)
    largest = float(np.exp(np.abs(_log_ratio(tokens)[outside]).max()))
    bounds = tokens.settings.assumed if tokens.settings.stated else f"a factor of {_ANY_CLIP:g} from 1"
    says = (
        f"clip and masks keep all {len(tokens):,} loss tokens, though {outside.sum():,} ratios are outside of {bounds}, by "
        f"up to a factor of {largest:.3g}"
    )
    return finding(says, tokens, outside, largest_factor=largest)


def unbounded_negative(tokens: Tokens) -> Verdict:
    """Kept tokens with a negative advantage whose ratio nothing bounds: one of them can outweigh a batch."""
    log_ratio = _log_ratio(tokens)
    high = (tokens.advantage < 0) & (log_ratio > math.log(tokens.settings.dual_clip) + _slack(tokens))
    if not high.any():
        return healthy(f"no ratio of a token with A < 0 is above {tokens.settings.dual_clip:g}", tokens)
    if not tokens.has("kept"):
        return cannot_tell(
            f"{high.sum():,} tokens with A < 0 have a ratio above {tokens.settings.dual_clip:g}; kept or not was not recorded"
        )
    kept = high & tokens.kept
    if not kept.any():
        return healthy(f"all {high.sum():,} tokens with A < 0 and a ratio above {tokens.settings.dual_clip:g} are masked")
    weight = np.exp(np.minimum(log_ratio.astype(np.float64), 60)) * np.abs(tokens.advantage)
    total = float(np.nansum(weight[tokens.kept]))
    share = float(weight[kept].sum()) / total if total else math.nan
    says = (
        f"{kept.sum():,} kept tokens with A < 0 have a ratio above {tokens.settings.dual_clip:g}, up to "
        f"{math.exp(min(float(log_ratio[kept].max()), 60)):.3g}: they hold {share:.1%} of the batch's weight |ratio A|"
    )
    return finding(says, tokens, kept, weight_share=share)


def zero_advantages(tokens: Tokens) -> Verdict:
    """Advantages that are all 0, so that the update learns nothing and costs all of its time, or that are not finite."""
    zero, wild = tokens.advantage == 0, ~np.isfinite(tokens.advantage) & ~tokens.missing("advantage")
    if wild.any():
        says = f"the advantages of {wild.sum():,} of {len(tokens):,} loss tokens are NaN or infinite: no loss can train them"
        return finding(says, tokens, wild)
    if zero.all():
        says = f"the advantages of all {len(tokens):,} loss tokens are 0: every group had one reward, or rewards were lost"
        return finding(says, tokens, zero)
    return healthy(f"{zero.mean():.1%} of the loss tokens have an advantage of 0", tokens)


def wrong_denominator(tokens: Tokens) -> Verdict:
    """Loss weights that are not those of the stated denominator, or of none that is known."""
    stated, fits = tokens.settings.denominator, _fitting(tokens)
    if (stated and stated not in fits) or not fits:
        said = f"are not those of the stated '{stated}'" if stated else "fit no denominator that is known"
        weight = tokens.loss_weight
        others = f" (they are those of {' or '.join(fits)})" if fits else ", such as when each micro-batch has its own"
        says = f"the loss weights {said}{others}: from {np.nanmin(weight):.3g} to {np.nanmax(weight):.3g}"
        return finding(says, tokens, smallest=float(np.nanmin(weight)), largest=float(np.nanmax(weight)))
    return healthy(f"the loss weights are those of {' or '.join(fits)}", tokens)


def _fitting(tokens: Tokens) -> list[str]:
    """The denominators that the weights of every update fit."""
    weight = tokens.loss_weight.astype(np.float64)
    use = np.isfinite(weight) & (weight != 0)
    _, update = np.unique(tokens.trainer_version[use], return_inverse=True)
    weight, length = weight[use], np.bincount(tokens.trajectory)[tokens.trajectory[use]]
    fits = {"sequence-mean": _is_constant(weight * length, update)}
    if _is_constant(weight, update):
        total = np.bincount(update, weights=weight)
        counted = bool((total < 1 + _EXACT).all())
        kept = tokens.kept[use] if tokens.has("kept") else np.ones(len(weight), np.bool_)
        of_kept = np.bincount(update, weights=weight * kept)
        fits |= {"constant": True, "token-mean": counted, "token-mean-kept": bool((np.abs(of_kept - 1) < _EXACT).all())}
    if tokens.has("group"):
        members = np.bincount(np.maximum(tokens.group, 0))[np.maximum(tokens.group[use], 0)]
        fits["group-mean"] = _is_constant(weight * members, update)
    return [name for name, fit in fits.items() if fit]


def _is_constant(values: NDArray[np.float64], update: NDArray[np.integer]) -> bool:
    """Whether values are equal within every update."""
    counts = np.maximum(np.bincount(update), 1)
    centre = (np.bincount(update, weights=values) / counts)[update]
    return bool((np.abs(values - centre) <= _EXACT * np.abs(centre)).all())
