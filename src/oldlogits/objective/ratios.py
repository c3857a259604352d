"""The total ratio, split into discrepancy and staleness: ``theta / mu = r_d * r_s``, in log space."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from oldlogits.core.errors import MissingLogprobError
from oldlogits.core.objective.shapes import Float
from oldlogits.core.policies import Policy, Variant


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitRatio:
    """The two factors of the total ratio, natural log.

    Args:
        log_r_d: ``log r_d``, detached; 0 where the variant has ``r_d = 1``.
        log_r_s: ``log r_s``; its gradient reaches THETA's log-probs and nothing else.
    """

    log_r_d: Float[Tensor, " token"]
    log_r_s: Float[Tensor, " token"]


def split_ratio(variant: Variant, logp: Mapping[Policy, Float[Tensor, " token"]]) -> SplitRatio:
    """Form both factors of a variant, from the log-probs of the sampled tokens.

    ``log r_d = sg(log X - log mu)`` (or 0) and ``log r_s = log theta - sg(log X)``, X the variant's proximal policy
    (PAPER, "One frame for all variants"). LINEAR and LOGLINEAR come from `linear_logp` and `loglinear_logp`.

    Example:
        ``decoupled_exact`` on one token with mu = .50, old = .55, theta = .66: ``r_d = .55 / .50 = 1.1`` and
        ``r_s = .66 / .55 = 1.2``; their product is the total ratio ``.66 / .50 = 1.32``.
    """
    numerator, denominator = variant.r_s.numerator, variant.r_s.denominator
    _require(logp, (numerator, denominator))
    return SplitRatio(log_r_d=log_discrepancy(variant, logp), log_r_s=logp[numerator] - logp[denominator].detach())


def log_discrepancy(variant: Variant, logp: Mapping[Policy, Float[Tensor, " token"]]) -> Float[Tensor, " token"]:
    """Form ``log r_d`` alone, detached: unless the proximal policy is an interpolation it needs no forward pass of THETA.

    Where the variant has ``r_d = 1``, any policy of `logp` gives the shape.
    """
    numerator, denominator = variant.r_d.numerator, variant.r_d.denominator
    if variant.r_d.is_one and logp:
        return torch.zeros_like(next(iter(logp.values())), requires_grad=False)
    _require(logp, (numerator, denominator))
    return logp[numerator].detach() - logp[denominator].detach()


def _require(logp: Mapping[Policy, Tensor], policies: Iterable[Policy]) -> None:
    missing = [policy.name for policy in policies if policy not in logp]
    if missing:
        raise MissingLogprobError(
            f"log-probs of {' and '.join(missing)} are missing",
            got=", ".join(policy.name for policy in logp) or "no log-probs",
            allowed="the log-probs of every policy in the variant's two ratios",
            fix="score them (OLD: oldlogits.sources.tagged, at the version of each token), or use a variant without them",
        )
