"""Which policy the trainer took for the old one: mu, THETA, another version's, or the one that sampled the token."""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from oldlogits.doctor.statistics import RESOLUTION, Estimate, difference, log_size, mean
from oldlogits.doctor.tokens import ALL, ENOUGH, UNKNOWN, Bools, Floats, Tokens
from oldlogits.doctor.verdicts import Verdict, cannot_tell, finding, healthy

LARGER: Final = math.log(1.5)
"""How much larger disagreement may be among some tokens than among others, as a log: kernels for prompts and for single tokens,
long and short contexts, round differently."""

ROUNDED: Final = "log-probs were rounded to bfloat16: numbers that are equal may be of two policies"

_CHANCE: Final = 1e-6
"""How likely chance may make log-probs of two policies equal in every bit on some trajectory of a batch."""

_MOST_LAGS: Final = 16

_COVERED: Final = 0.999
"""Share of the engine's noise at lag 0 that bounds it elsewhere."""


def ratio_is_one(tokens: Tokens) -> Verdict:
    """A ratio that is identically 1, so that no clip acts, while engine and trainer drift apart with the lag."""
    where = tokens.in_doubt & np.isfinite(tokens.old) & np.isfinite(tokens.theta)
    share = float(np.mean(tokens.old[where] == tokens.theta[where])) if where.any() else 0.0
    if share < ALL:
        return healthy(f"theta / old is other than 1 on {1 - share:.1%} of {where.sum():,} tokens in doubt", tokens)
    if not tokens.has("lag"):
        return cannot_tell("theta / old is 1 on every token: right at lag 0 in the first step, wrong later; no lag is recorded")
    grown = growth(tokens, tokens.theta - tokens.mu)
    if grown is not None and grown.low > 0:
        says = (
            f"theta / old is exactly 1 on {share:.1%} of {where.sum():,} tokens in doubt, while theta and mu are "
            f"{math.exp(grown.value):.1f} times further apart at the higher lags: the clip cannot act on what has moved"
        )
        return finding(says, tokens, where, shown=where & (tokens.lag > 0), share=share, times_further=math.exp(grown.value))
    if (tokens.lag == 0).all():
        return healthy("theta / old is 1 on every token, and all are of lag 0: so it is in the first step", tokens)
    return cannot_tell("theta / old is 1 on every token, and theta and mu are as far apart at every lag that is there")


def old_is_mu(tokens: Tokens) -> Verdict:
    """OLD that is the engine's own log-prob, bit for bit: the mismatch between the engines is in the clipped ratio."""
    if tokens.is_rounded and bool((tokens.old == tokens.mu)[tokens.in_doubt].all()):
        return cannot_tell(ROUNDED)
    if not tokens.stands_in(tokens.mu):
        part = _copied(tokens)
        if not part.any():
            return healthy("OLD is not mu", tokens)
        says = (
            f"OLD equals mu in every bit on {part.sum():,} tokens in doubt, which are all of their trajectories, and not in "
            "the other ones: one part of the batch, such as a rank's or a worker's, has no log-probs of the trainer"
        )
        return finding(says, tokens, part)
    fresh = tokens.in_doubt & (tokens.lag == 0) & np.isfinite(tokens.theta)
    aligned = fresh.sum() >= ENOUGH and np.mean(tokens.theta[fresh] == tokens.mu[fresh]) >= ALL
    if aligned:
        return healthy("OLD is mu, and at lag 0 so is THETA: the engines agree in every bit", tokens)
    where = tokens.in_doubt & (tokens.old == tokens.mu)
    says = (
        f"OLD equals mu in every bit on {where.sum():,} tokens in doubt: nothing was computed by the trainer, r_d is 1 by "
        "construction and the engines' mismatch is in the clipped ratio"
    )
    return finding(says, tokens, where)


def _copied(tokens: Tokens) -> Bools:
    """Tokens of trajectories where OLD is mu in every bit, though elsewhere it is so too rarely for that to be chance."""
    where = tokens.in_doubt & np.isfinite(tokens.old)
    equal = where & (tokens.old == tokens.mu)
    num = np.bincount(tokens.trajectory, weights=where)
    whole = np.bincount(tokens.trajectory, weights=equal) == num
    rest = where & ~whole[tokens.trajectory]
    share = (int(equal[rest].sum()) + 1) / (int(rest.sum()) + 1)
    if tokens.is_rounded or rest.sum() < ENOUGH or share > 0.5:
        return np.zeros(len(tokens), np.bool_)
    by_chance = num * math.log(share) > math.log(_CHANCE / len(num))
    copied: Bools = where & (whole & ~by_chance)[tokens.trajectory]
    return copied


def old_is_theta(tokens: Tokens) -> Verdict:
    """OLD that is THETA at a lag above 0: another version's log-prob under the name of OLD."""
    comparable = tokens.in_doubt & np.isfinite(tokens.old) & np.isfinite(tokens.theta)
    late = comparable & (tokens.lag > 0)
    if late.sum() < ENOUGH:
        return healthy("no lag above 0: OLD may be THETA", tokens)
    lags = np.minimum(tokens.lag[late], 63)
    equal = (tokens.old[late] == tokens.theta[late]).astype(float)
    counts, sums = np.bincount(lags), np.bincount(lags, weights=equal)
    same = [int(lag) for lag in np.flatnonzero(counts >= ENOUGH) if sums[lag] >= ALL * counts[lag]]
    if same and tokens.is_rounded:
        return cannot_tell(ROUNDED)
    if not same:
        return healthy("OLD and THETA differ at every lag above 0", tokens)
    where = late & np.isin(np.minimum(tokens.lag, 63), same) & (tokens.old == tokens.theta)
    says = (
        f"OLD equals THETA in every bit on {where.sum():,} tokens in doubt of lag {', '.join(map(str, same[:6]))}: it was "
        "computed with the weights of the update, not with those that sampled, or versions are labelled one off (a learning "
        "rate of 0 also does it)"
    )
    return finding(says, tokens, where, share=float(where.sum() / late.sum()))


def old_of_another_version(tokens: Tokens) -> Verdict:
    """OLD that is further from mu the higher the lag: r_d then holds drift, so OLD is not of the version that sampled."""
    if tokens.stands_in(tokens.mu):
        return cannot_tell("OLD is mu")
    if (nearer := _nearer_theta(tokens.sample)) is not None:
        return nearer
    grown = growth(tokens.sample, tokens.sample.old - tokens.sample.mu)
    if grown is None:
        return cannot_tell("all tokens are of one lag, so that nothing shows whether |old - mu| grows with it")
    if grown.exceeds(LARGER):
        says = (
            f"|log old - log mu| is {math.exp(grown.value):.1f} times as large at the higher lags (log {grown}); two engines "
            "with the same weights disagree alike at every lag: OLD is of another version than the token"
        )
        return finding(says, tokens, tokens.lag > 0, times=math.exp(grown.value))
    return healthy(f"|log old - log mu| does not grow with the lag (log {grown})", tokens)


def _nearer_theta(tokens: Tokens) -> Verdict | None:
    """A finding where THETA, which has moved on, is nearer to mu than OLD at some lag; None: it is not."""
    if not tokens.has("logp_theta"):
        return None
    off, moved = tokens.old - tokens.mu, tokens.theta - tokens.mu
    use = tokens.in_doubt & np.isfinite(off) & np.isfinite(moved) & (tokens.lag > 0)
    off, moved = (np.where(use, np.abs(one), 0.0) + RESOLUTION for one in (off, moved))
    further = np.log(off / moved)
    for lag in np.unique(tokens.lag[use])[:_MOST_LAGS]:
        where = use & (tokens.lag == lag)
        found = mean(further[where], tokens.clusters[where])
        if found.exceeds(LARGER):
            says = (
                f"at lag {lag} |log old - log mu| is {math.exp(found.value):.1f} times |log theta - log mu| (log {found}): "
                "the weights of the update are nearer to those that sampled than OLD: it is of another version than the token"
            )
            return finding(says, tokens, where, lag=float(lag), times=math.exp(found.value))
    return None


def missing_old(tokens: Tokens) -> Verdict:
    """OLD that is missing at a lag above 0: how many decisions of clip and band could be wrong, from what is there."""
    late = (tokens.lag > 0) & np.isfinite(tokens.mu) & np.isfinite(tokens.theta)
    if not late.any():
        return healthy("no token is of a lag above 0: THETA of the first step is OLD", tokens)
    if tokens.has_own_old:
        return healthy("OLD was recorded, and is neither mu nor THETA", tokens)
    noise = _noise(tokens)
    stand_in = tokens.theta if tokens.has("logp_old") and tokens.stands_in(tokens.theta) else tokens.mu
    clip, band = undecided(tokens, stand_in, noise)
    wrong = late & (clip | band)
    weight = np.where(late, np.exp(np.minimum(tokens.theta - tokens.mu, 20)) * np.abs(np.nan_to_num(tokens.advantage)), 0.0)
    by_weight = float(weight[wrong].sum() / weight.sum()) if weight.sum() > 0 else math.nan
    by_clip, by_band = float(clip[late].mean()), float(band[late].mean())
    known = f"noise of at most {noise:.2g} nats at lag 0" if math.isfinite(noise) else "no token of lag 0 to bound the noise by"
    says = (
        f"at lag > 0 no OLD of a token's own version was recorded: r_d and r_s cannot be split without the weights. From "
        f"what is there ({known}), up to {by_clip:.1%} of the clip's and {by_band:.1%} of the band's "
        f"decisions on {late.sum():,} tokens could be wrong, {by_weight:.1%} of their weight |R A|; {tokens.settings.assumed}"
    )
    shown = wrong if wrong.any() else late
    return finding(says, tokens, wrong, shown=shown, clip=by_clip, band=by_band, by_weight=by_weight, noise=noise)


def undecided(tokens: Tokens, stand_in: Floats, noise: float) -> tuple[Bools, Bools]:
    """Where clip and band, decided with a stand-in for OLD, could decide otherwise with OLD in ``mu +- noise``."""
    settings, total = tokens.settings, tokens.theta - tokens.mu
    low, high = (math.log(1 - settings.eps_low) if settings.eps_low < 1 else -math.inf), math.log(1 + settings.eps_high)
    rises, falls = tokens.advantage > 0, tokens.advantage < 0
    taken = tokens.theta - stand_in
    clipped = (rises & (taken > high)) | (falls & (taken < low))
    may_clip = (rises & (total + noise > high)) | (falls & (total - noise < low))
    may_keep = ~((rises & (total - noise > high)) | (falls & (total + noise < low)))
    clip = np.where(clipped, may_keep, may_clip)
    wide = math.log(settings.band)
    band = (np.abs(stand_in - tokens.mu) > wide) | (noise > wide)
    return clip.astype(np.bool_), band.astype(np.bool_)


def _noise(tokens: Tokens) -> float:
    """What bounds |log r_d|: almost all of it at lag 0; inf if there is too little."""
    fresh = np.abs((tokens.theta - tokens.mu)[(tokens.lag == 0) & np.isfinite(tokens.theta - tokens.mu)])
    return float(np.quantile(fresh, _COVERED)) if len(fresh) >= 1 / (1 - _COVERED) else math.inf


def growth(tokens: Tokens, moved: Floats) -> Estimate | None:
    """How much larger ``|moved|`` is at the higher lags, as a log; None: there is only one lag, or too few tokens."""
    where = tokens.in_doubt & np.isfinite(moved) & (tokens.lag != UNKNOWN)
    lag = tokens.lag[where]
    if not len(lag) or lag.min() == lag.max():
        return None
    higher = lag > max(int(lag.min()), 0) if lag.min() <= 0 else lag > np.median(lag)
    higher = higher if higher.any() else lag > lag.min()
    found = difference(log_size(moved[where], tokens.mu[where]), higher, tokens.clusters[where])
    return found if found.is_known else None
