"""Proximal policies that are interpolated between MU and THETA at loss time, and so need no source."""

from __future__ import annotations

import torch
from torch import Tensor

from oldlogits.core.errors import ConfigError
from oldlogits.core.objective.shapes import Float, Int


@torch.no_grad()
def linear_logp(
    logp_mu: Float[Tensor, " token"],
    logp_theta: Float[Tensor, " token"],
    weight_mu: float | Float[Tensor, " token"],
) -> Float[Tensor, " token"]:
    """Log-prob of the arithmetic interpolation, detached: ``log(a mu + (1 - a) theta)`` with ``a = weight_mu``.

    ``weight_mu`` is the weight *on mu*, in [0, 1], one for all tokens or one per token; 1 gives exactly MU and 0
    exactly THETA. A per-token weight outside [0, 1] gives NaN, which the surrogate drops and counts.

    Example:
        mu = .2, theta = .6, weight_mu = .25: ``log(.25 * .2 + .75 * .6) = log .5 = -0.693``.
    """
    weight = _weight(weight_mu, logp_mu)
    return torch.logaddexp(torch.log(weight) + logp_mu, torch.log1p(-weight) + logp_theta)


@torch.no_grad()
def loglinear_logp(
    logp_mu: Float[Tensor, " token"],
    logp_theta: Float[Tensor, " token"],
    weight_mu: float | Float[Tensor, " token"],
) -> Float[Tensor, " token"]:
    """Log-prob of the token-wise log-linear interpolation, detached: ``a log mu + (1 - a) log theta``.

    ``a = weight_mu`` as in `linear_logp`. A-3PO's coefficient is the weight on *theta*: ``weight_mu = 1 - alpha``
    (arXiv 2512.06547).

    Example:
        mu = .1, theta = .4, weight_mu = .5: ``log sqrt(.1 * .4) = log .2 = -1.609``.
    """
    weight = _weight(weight_mu, logp_mu)
    mixed = weight * logp_mu + (1 - weight) * logp_theta
    mixed = torch.where(weight == 0, logp_theta, mixed)  # not 0 * log 0, which is NaN
    mixed = torch.where(weight == 1, logp_mu, mixed)
    return torch.where((weight < 0) | (weight > 1), torch.nan, mixed)


def a3po_weight_mu(staleness: Int[Tensor, " token"]) -> Float[Tensor, " token"]:
    """Give A-3PO's weight *on mu* of each token, float32: ``1 / s`` at staleness s, and 1 at staleness 0.

    A-3PO (arXiv 2512.06547) writes the weight on *theta*: ``alpha = (v_prox - v_behave) / (v_theta - v_behave)`` with
    ``v_prox = v_theta - 1``, clipped to [0, 1], and 0 where ``v_behave = v_theta``. With ``s = v_theta - v_behave``
    that is ``(s - 1) / s``, and what is left for mu ``1 - alpha = 1 / s``.

    Args:
        staleness: Trainer version minus behaviour version, >= 0.

    Example:
        Staleness 0, 1, 2, 4: weights 1, 1, 1/2, 1/4 on mu; the older a token, the closer its proximal policy is to theta.
    """
    return 1 / staleness.clamp(min=1).to(torch.float32)


def _weight(weight_mu: float | Tensor, like: Tensor) -> Tensor:
    if isinstance(weight_mu, Tensor):
        return weight_mu.to(like.dtype)
    if not 0 <= weight_mu <= 1:
        raise ConfigError(
            "weight_mu is not a weight",
            got=str(weight_mu),
            allowed="a number in [0, 1]: the weight on mu",
            fix="a peer's coefficient on theta is 1 - weight_mu",
        )
    return torch.tensor(weight_mu, dtype=like.dtype, device=like.device)
