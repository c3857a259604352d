"""What is added to each token's surrogate beside the policy's own loss: a penalty on leaving a reference, and the entropy.

``S' = S - kl_coefficient * k + entropy_bonus * H``, with each token's share of the loss as S has. No band, clip or advantage
acts on the two: they hold for every loss token.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from oldlogits.core.errors import ConfigError
from oldlogits.core.objective.shapes import Float

KlEstimator = Literal["k1", "k2", "k3"]
"""The estimators of a Kullback-Leibler divergence from one log-ratio a token."""


def kl_estimate(
    logp: Float[Tensor, " token"], logp_reference: Float[Tensor, " token"], estimator: KlEstimator
) -> Float[Tensor, " token"]:
    """Estimate ``KL(policy || reference)`` in nats from tokens that the policy sampled (Schulman, "Approximating KL").

    With ``d = log policy - log reference``, the reference detached::

        k1 = d                   unbiased; may be negative    gradient   grad log policy
        k2 = d^2 / 2             biased, never negative       gradient   d grad log policy
        k3 = exp(-d) - 1 + d     unbiased, never negative     gradient   (1 - reference / policy) grad log policy

    Gradients are those of the estimate as a part of a loss. On average over tokens of the policy itself that of k1 is 0, that
    of k2 is the gradient of ``KL(policy || reference)``, and that of k3 that of ``KL(reference || policy)``. As a part of the
    reward it is k1 that has the gradient of ``KL(policy || reference)``. A token whose estimate is not finite has 0 and no
    gradient.

    Raises:
        ConfigError: The estimator is unknown.

    Example:
        policy .5, reference .25: d = log 2 = 0.693, k1 = 0.693, k2 = 0.240, k3 = 0.5 - 1 + 0.693 = 0.193.
    """
    log_ratio = logp - logp_reference.detach()
    log_ratio = torch.where(log_ratio.isfinite() & ((-log_ratio).exp() < torch.inf), log_ratio, 0.0)
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return log_ratio.square() / 2
    if estimator == "k3":
        return (-log_ratio).expm1() + log_ratio
    raise ConfigError("unknown estimator of a divergence", got=repr(estimator), allowed="k1, k2, k3", fix="choose one of these")


def regularised(
    values: Float[Tensor, " token"],
    *,
    kl: Float[Tensor, " token"] | None = None,
    kl_coefficient: float = 0.0,
    entropy: Float[Tensor, " token"] | None = None,
    entropy_bonus: float = 0.0,
) -> Float[Tensor, " token"]:
    """Give ``S - kl_coefficient * kl + entropy_bonus * entropy``, in nats; an entropy that is not finite adds nothing.

    Args:
        values: The surrogate S of each token, to be maximised.
        kl: An estimate of the divergence at each token; None: there is no reference.
        kl_coefficient: What the estimates are multiplied by.
        entropy: The entropy of the policy's distribution at each token, with its gradient; None: there is no bonus.
        entropy_bonus: What the entropies are multiplied by.

    Example:
        S = 2, kl = 0.5 at 0.1, H = 3 at 0.01: 2 - 0.05 + 0.03 = 1.98.
    """
    if kl is not None:
        values = values - kl_coefficient * kl
    if entropy is not None:
        values = values + entropy_bonus * torch.where(entropy.isfinite(), entropy, 0.0)
    return values
