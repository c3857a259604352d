"""The objective as pure tensor functions over flat ``[token]`` tensors. PAPER, "The objective, spelled out".

::

    logp --split_ratio--> log_r_d --band_mask--+
              |                                +--> surrogate --weighted_loss(token_weights)--> loss
              +---------> log_r_s --clip_mask--+        |
                                                        +--> diagnose --to_metrics--> numbers

Example:
    >>> import torch
    >>> from oldlogits.core.policies import MU, OLD, THETA, VARIANTS
    >>> logp = {policy: torch.tensor([p]).log() for policy, p in {MU: 0.50, OLD: 0.55, THETA: 0.66}.items()}
    >>> loss_mask = torch.tensor([True])
    >>> tokens = surrogate(
    ...     split_ratio(VARIANTS["decoupled_exact"], logp), torch.tensor([2.0]), loss_mask,
    ...     band=1.5, eps_low=0.2, eps_high=0.28, dual_clip=3.0, discrepancy="weight_and_mask",
    ... )
    >>> weighted_loss(tokens.values, token_weights(loss_mask, mode="token-mean"))
    tensor(-2.6400)
"""

from oldlogits.objective.advantages import AdvantageMode, group_advantages
from oldlogits.objective.aggregate import Aggregation, token_weights, weighted_loss
from oldlogits.objective.correct import Corrected, correct, mean_weight
from oldlogits.objective.decision import DecisionSums, decision_sums, exact_variant
from oldlogits.objective.diagnostics import QUANTILES, diagnose, to_metrics
from oldlogits.objective.frame import Frame
from oldlogits.objective.levels import at_level, binary_kl
from oldlogits.objective.masks import band_mask, clip_log_ratio, eps_at_lag, finite_mask, kept_mask, truncate_log_ratio
from oldlogits.objective.padded import PaddedLoss, Predicts, flatten_padded, padded_loss, unflatten_padded
from oldlogits.objective.proximal import a3po_weight_mu, linear_logp, loglinear_logp
from oldlogits.objective.ratios import SplitRatio, log_discrepancy, split_ratio
from oldlogits.objective.regularise import KlEstimator, kl_estimate, regularised
from oldlogits.objective.surrogate import Discrepancy, surrogate

__all__ = [
    "QUANTILES",
    "AdvantageMode",
    "Aggregation",
    "Corrected",
    "DecisionSums",
    "Discrepancy",
    "Frame",
    "KlEstimator",
    "PaddedLoss",
    "Predicts",
    "SplitRatio",
    "a3po_weight_mu",
    "at_level",
    "band_mask",
    "binary_kl",
    "clip_log_ratio",
    "correct",
    "decision_sums",
    "diagnose",
    "eps_at_lag",
    "exact_variant",
    "finite_mask",
    "flatten_padded",
    "group_advantages",
    "kept_mask",
    "kl_estimate",
    "linear_logp",
    "log_discrepancy",
    "loglinear_logp",
    "mean_weight",
    "padded_loss",
    "regularised",
    "split_ratio",
    "surrogate",
    "to_metrics",
    "token_weights",
    "truncate_log_ratio",
    "unflatten_padded",
    "weighted_loss",
]
