"""Log-probs that are none, and log-probs of another token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np

from oldlogits.doctor.statistics import mean
from oldlogits.doctor.tokens import ENOUGH, Bools, Floats, Tokens
from oldlogits.doctor.verdicts import Verdict, finding, healthy

ROUNDING: Final = 1e-5
"""Nats above 0 that float32 logits round a log-prob to."""

_DENIED: Final = -0.1
"""Log-prob with which one policy denies that a token was certain, as another says with exactly 0."""

_SEVERAL: Final = 3


def _columns(tokens: Tokens) -> Iterator[tuple[str, Floats]]:
    for name, column in (("logp_mu", tokens.mu), ("logp_old", tokens.old), ("logp_theta", tokens.theta)):
        if tokens.has(name):
            yield name, column


def zero_logprobs(tokens: Tokens) -> Verdict:
    """Log-probs of exactly 0.0, which means certainty, where another policy was in doubt: a placeholder for a missing value."""
    columns = dict(_columns(tokens))
    for name, column in columns.items():
        others = [other for key, other in columns.items() if key != name]
        zero = column == 0
        doubted = np.logical_or.reduce([other < _DENIED for other in others]) if others else np.ones_like(zero)
        wrong = zero & doubted
        if (others and wrong.sum() >= _SEVERAL) or (not others and zero.sum() >= ENOUGH and zero.all()):
            worst = float(min((float(np.nanmin(other[wrong])) for other in others), default=0.0))
            says = (
                f"{name} is exactly 0.0 (probability 1) on {wrong.sum():,} tokens that another policy gives as little as "
                f"{np.exp(worst):.2g}: a placeholder where a log-prob is missing"
            )
            return finding(says, tokens, wrong)
    return healthy("no log-prob is 0.0 where another policy was in doubt", tokens)


def impossible_logprobs(tokens: Tokens) -> Verdict:
    """Log-probs that are positive or not finite."""
    for name, column in _columns(tokens):
        positive, wild = column > ROUNDING, ~np.isfinite(column) & ~tokens.missing(name)
        wrong = positive | wild
        if wrong.any():
            says = f"{name} is above 0 on {positive.sum():,} tokens and not finite on {wild.sum():,}"
            return finding(says, tokens, wrong, positive=float(positive.sum()), non_finite=float(wild.sum()))
    return healthy("every log-prob is finite and at most 0", tokens)


def missing_logprobs(tokens: Tokens) -> Verdict:
    """Loss tokens without the log-prob of the engine that sampled them, among others that have one."""
    for name, _ in _columns(tokens):
        missing = tokens.missing(name)
        if missing.any():
            return finding(
                f"{missing.sum():,} of {len(tokens):,} loss tokens have no {name}: a ratio of them is a guess", tokens, missing
            )
    return healthy("every loss token has the log-probs that others have", tokens)


def shifted_by_one(tokens: Tokens) -> Verdict:
    """Log-probs of one policy that fit those of another better one token on: columns that are a position apart."""
    tokens = tokens.sample
    follows = (np.diff(tokens.trajectory) == 0) & (np.diff(tokens.index) == 1)
    columns = dict(_columns(tokens))
    for name in ("logp_old", "logp_theta"):
        if name not in columns:
            continue
        mu, other = (np.clip(column, -20, 0) for column in (tokens.mu, columns[name]))
        use: Bools = follows & np.isfinite(mu[1:] + mu[:-1] + other[1:] + other[:-1])
        here = ((mu[:-1] - other[:-1]) ** 2 + (mu[1:] - other[1:]) ** 2)[use] / 2
        for step, apart in ((1, (mu[1:] - other[:-1]) ** 2), (-1, (mu[:-1] - other[1:]) ** 2)):
            better = mean(apart[use] - here, tokens.clusters[1:][use])
            if better.is_known and better.high < 0:
                says = (
                    f"logp_mu fits {name} better one token {'later' if step > 0 else 'earlier'} than at its own place: mean "
                    f"squared difference {float(apart[use].mean()):.3g} there and {float(here.mean()):.3g} here"
                )
                return finding(
                    says,
                    tokens,
                    np.ones(len(tokens), np.bool_),
                    offset=float(step),
                    there=float(apart[use].mean()),
                    here=float(here.mean()),
                )
    return healthy("log-probs of mu and of the trainer fit best at the same token", tokens)
