"""FlashREINFORCE: a gate for whole sequences, by their mean binary KL divergence (NVIDIA, 2026; OpenRLHF and Molt)."""

from __future__ import annotations

from oldlogits.core.loss import LossInputs, LossTerms, Objective
from oldlogits.core.objective.options import FlashOptions
from oldlogits.objective.frame import Frame
from oldlogits.objective.levels import binary_kl


def flash_reinforce(tokens: LossInputs, objective: Objective) -> LossTerms:
    """``S = M sg(r_s) A log theta``; M keeps a sequence where the mean of ``KL(X || theta)`` over its tokens is <= threshold.

    The divergence is over two outcomes, the sampled token or any other one; X is the variant's proximal policy, MU in the
    paper. The paper averages within sequences first ("sequence-mean"), takes the reward less the batch's mean as the
    advantage, one rollout a prompt, and one optimizer step a batch.

    Example:
        Two tokens of a sequence with divergences .002 and .01: the mean is .006, and at .005 both are masked.
    """
    frame, own = Frame.of(tokens, objective), objective.own(FlashOptions)
    divergence = frame.mean_or_sum(binary_kl(frame.log_proximal, frame.log_theta), "geometric")
    kept = divergence <= own.threshold
    slope = frame.advantages * frame.r_s * kept
    return frame.terms(slope * frame.log_theta, slope, kept=kept)
