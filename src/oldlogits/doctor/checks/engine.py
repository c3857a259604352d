"""What the engine's log-probs say of its weights, its cache and its distribution. All of these look at ``log r_d``."""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from oldlogits.doctor.checks.policies import LARGER
from oldlogits.doctor.statistics import Estimate, Z, difference, is_more, log_size, mean
from oldlogits.doctor.tokens import Bools, Tokens
from oldlogits.doctor.verdicts import Verdict, cannot_tell, finding, healthy

FLOOR: Final = 1e-3
"""What the mean of r_d may be off 1 in any case: rounding has no standard error."""

_UNSEEN: Final = 3.0
"""How many more tokens with the largest r_d a sample may have missed."""

_SURE: Final = math.log(0.9)
_LOWER: Final = -2.0
_RARE: Final = 1e-4
"""Share of an engine's certain tokens that two copies of the same weights may disagree on by that much."""

_FEW: Final = 0.005
"""Share of tokens: when it holds half of all disagreement, the rest agrees."""

NO_R_D: Final = "no token has an OLD of its own version, nor is known to be of lag 0"


def mean_r_d(tokens: Tokens) -> Verdict:
    """A mean of r_d other than 1: tokens were not sampled from the distribution that mu is of (top-p, raw log-probs)."""
    use = np.isfinite(tokens.log_r_d)  # of lag 0 where no OLD was recorded
    if not use.any():
        return cannot_tell(NO_R_D)
    r_d = np.exp(np.clip(tokens.log_r_d[use].astype(np.float64), -30, 30))
    found = mean(r_d, tokens.clusters[use])
    if not found.is_known:
        return cannot_tell(f"too few tokens with an r_d for an interval: {use.sum():,}")
    allowed = max(Z * found.error + _UNSEEN * float(r_d.max()) / len(r_d), FLOOR)
    if abs(found.value - 1) > allowed:
        kept = f"; if the support was cut, {found.value:.1%} of the mass is left" if found.value < 1 else ""
        says = f"the mean of r_d over {len(r_d):,} tokens is {found}; of one distribution it would be 1{kept}"
        return finding(says, tokens, use, mean=found.value, error=found.error, allowed=allowed)
    return healthy(f"the mean of r_d is {found}", tokens, mean=found.value)


def stale_cache(tokens: Tokens) -> Verdict:
    """Larger disagreement behind a change of versions within a trajectory: keys and values of older weights were kept."""
    tokens = tokens.sample
    changed = (np.diff(tokens.version, prepend=0) != 0) & ~tokens.begins
    if not changed.any():
        return healthy("no trajectory has several versions", tokens)
    first = np.flatnonzero(tokens.begins)
    so_far = np.cumsum(changed)
    before = np.repeat(so_far[first], np.diff(np.append(first, len(tokens))))
    return _compared(tokens, so_far > before, "behind a change of versions in their trajectory", LARGER)


def jump_at_borders(tokens: Tokens) -> Verdict:
    """Larger disagreement on the first token of a segment: the context that engine and trainer saw there is not the same."""
    tokens = tokens.sample
    border = (np.diff(tokens.segment, prepend=0) != 0) & ~tokens.begins
    if not border.any():
        return healthy("every trajectory is one segment", tokens)
    return _compared(tokens, border, "that begin a segment", math.log(3))


def _compared(tokens: Tokens, chosen: Bools, said: str, larger: float) -> Verdict:
    use = np.isfinite(tokens.log_r_d) & tokens.in_doubt
    if not use.any():
        return cannot_tell(NO_R_D)
    found: Estimate = difference(log_size(tokens.log_r_d[use], tokens.mu[use]), chosen[use], tokens.clusters[use])
    if not found.is_known:
        return cannot_tell(f"too few tokens {said}")
    if found.exceeds(larger):
        says = f"|log r_d| is {math.exp(found.value):.1f} times as large on {int((chosen & use).sum()):,} tokens {said}"
        return finding(says, tokens, chosen, times=math.exp(found.value))
    return healthy(f"|log r_d| is no larger on tokens {said} (log {found})", tokens)


def confident_disagreement(tokens: Tokens) -> Verdict:
    """Tokens that the engine was sure of and the trainer finds unlikely: other weights, or other arithmetic."""
    sure = (tokens.mu > _SURE) & np.isfinite(tokens.log_r_d)
    if not sure.any():
        return cannot_tell(NO_R_D)
    denied = sure & (tokens.log_r_d < _LOWER)
    if is_more(int(denied.sum()), int(sure.sum()), _RARE):
        says = (
            f"the trainer gives {denied.sum():,} of {sure.sum():,} tokens that the engine was 90% sure of under a seventh of "
            "that: other weights than the label says, or another arithmetic"
        )
        return finding(says, tokens, denied, share=float(denied.sum() / sure.sum()))
    return healthy(f"{denied.sum():,} of {sure.sum():,} tokens that the engine was sure of are denied", tokens)


def few_tokens(tokens: Tokens) -> Verdict:
    """Disagreement that sits on few tokens while the rest agrees: a tail, as near-ties of experts or overflow make."""
    use = np.isfinite(tokens.log_r_d) & tokens.in_doubt
    if use.sum() < 10 / _FEW:
        return cannot_tell(f"too few tokens in doubt with an r_d: {use.sum():,}")
    sizes = np.abs(tokens.log_r_d[use]).astype(np.float64)
    ordered = np.sort(sizes)[::-1]
    num = int(np.searchsorted(np.cumsum(ordered), ordered.sum() / 2)) + 1
    outside = ordered[num - 1] > math.log(tokens.settings.band)
    if outside and num < _FEW * len(sizes):
        where = use & (np.abs(tokens.log_r_d) >= ordered[num - 1])
        says = (
            f"{num:,} of {len(sizes):,} tokens in doubt hold half of it all, {ordered[num - 1]:.2g} nats or more each, "
            f"while the median is {np.median(sizes):.1e}: a tail that a band masks and a mean hides"
        )
        return finding(says, tokens, where, share=num / len(sizes), median=float(np.median(sizes)))
    return healthy(f"half of all disagreement is spread over {num / len(sizes):.1%} of the tokens in doubt", tokens)
