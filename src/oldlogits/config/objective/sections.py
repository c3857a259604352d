"""The recipe's sections of the objective and its proximal policy. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from oldlogits.config.objective.presets import PRESETS
from oldlogits.config.ranges import (
    AboveOne,
    AboveZero,
    Auto,
    Count,
    Decay,
    NotNegative,
    Share,
)
from oldlogits.core.loss import LOSSES
from oldlogits.core.source import SOURCES


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveConfig:
    """The loss, its bounds, and what it is divided by."""

    loss: Annotated[str, LOSSES] = "masked_is"
    """What is made of the log-probs of a micro-batch: `oldlogits show objectives` (docs/objectives.md)."""
    options: Mapping[str, float | str] = field(default_factory=dict)
    """The loss's own knobs, such as {high = 4.0} with loss = "cispo"; docs/objectives.md lists those of each loss."""
    preset: Annotated[str, ("", *PRESETS)] = ""
    """Another project's objective (`oldlogits show presets`): its keys take the place of the defaults, and where the command
    line names it that of the recipe's, too; a key beside it, in the same place, takes that of the preset's."""
    eps_low: Annotated[float, Gt(0), Lt(1)] = 0.2
    """Negative advantages: r_s is clipped below 1 - eps_low."""
    eps_high: AboveZero = 0.28
    """Positive advantages: r_s is clipped above 1 + eps_high."""
    dual_clip: AboveOne = 3.0
    """Negative advantages: r_s is clipped above dual_clip; inf switches it off."""
    clip_by_lag: Literal["none", "inverse", "inverse-sqrt"] = "none"
    """A narrower clip for older tokens: eps_low and eps_high over 1 + s, or over its root, at staleness s. Of
    loss = "masked_is" alone."""
    clip: Literal["ppo", "truncated"] = "ppo"
    """ppo: a token beyond eps_low, eps_high or dual_clip is masked. truncated: none is; the weight r_s of a token's gradient
    is capped at objective.is_cap (truncated importance sampling, with variant = "ppo_clip_train_infer")."""
    is_cap: AboveOne = 2.0
    """clip = "truncated" only: the largest weight r_s; inf: no bound."""
    mismatch_correction: Literal["weight_and_mask", "mask"] = "weight_and_mask"
    """What r_d does to a token: it weights and masks it, or only masks it."""
    interpolation_mu: Share = 0.5
    """The weight on MU of a linear or log-linear interpolation."""
    interpolation_schedule: Literal["fixed", "a3po"] = "fixed"
    """fixed: interpolation_mu for every token. a3po: 1 / s at staleness s (1 at staleness 0), whatever interpolation_mu is."""
    loss_aggregation: Literal["token-mean", "token-mean-kept", "sequence-mean", "constant"] = "token-mean"
    """What the loss is divided by; other trainers differ by N / N_kept on the same data."""
    loss_aggregation_tokens: AboveZero = 1.0
    """The divisor of loss_aggregation = "constant", in tokens per optimizer step."""
    advantage: Literal[
        "group-normalised", "mean-only", "leave-one-out", "batch-normalised", "token-normalised", "batch-baseline", "turn-to-go"
    ] = "group-normalised"
    """How rewards become advantages. group-normalised: GRPO. mean-only: Dr. GRPO. leave-one-out: RLOO. batch-normalised: less
    the group's mean, over the standard deviation of the batch. token-normalised: the same with mean and deviation over its
    tokens. batch-baseline: mean and deviation of the batch, which a rollout.group_size of 1 needs. turn-to-go: of each
    turn by itself, what the episode was given from it on, less the group's mean (docs/regularisers.md)."""
    branch_weight: Literal["each", "shared"] = "each"
    """What each branch of an agent program's episode (a conversation of its own, such as a sub-agent's, or the one after a
    compaction) gets of the episode's advantage. each: all of it. shared: an equal part of it."""
    kl_coefficient: NotNegative = 0.0
    """Weight of the divergence from a reference, an earlier version of this run (docs/regularisers.md); 0: there is none."""
    kl_in: Literal["loss", "reward"] = "loss"
    """With objective.kl_coefficient: where the divergence counts. loss: each token's estimate is added to its loss. reward: the
    sum over an episode's tokens of log mu - log reference is taken off its reward, before rewards become advantages."""
    kl_estimator: Literal["auto", "k1", "k2", "k3"] = "auto"
    """With objective.kl_coefficient: the estimate from a token's log-ratio. auto: k3 in the loss, k1 in the reward. k2: in the
    loss its gradient is that of KL(theta || reference)."""
    kl_reference_every: Count = 0
    """With objective.kl_coefficient: updates after which the reference moves on to the version of that moment; 0: it stays at
    version 0, with which the run begins."""
    entropy_bonus: NotNegative = 0.0
    """Weight of the entropy of THETA's distribution at each loss token, which is added to the token's surrogate; 0: none."""

    @property
    def has_reference(self) -> bool:
        """Whether there is a reference, whose version is kept and scores every batch."""
        return self.kl_coefficient > 0

    @property
    def kl_estimate(self) -> Literal["k1", "k2", "k3"]:
        """`kl_estimator`, where "auto" is decided."""
        if self.kl_estimator != "auto":
            return self.kl_estimator
        return "k3" if self.kl_in == "loss" else "k1"

    def reference_at(self, version: int) -> int:
        """Give the version that is the reference of a batch that enters training at `version`."""
        return version // self.kl_reference_every * self.kl_reference_every if self.kl_reference_every else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ProximalConfig:
    """The proximal policy, which r_s is taken over: OLD, or what the variant uses in its place."""

    source: Auto | Annotated[str, SOURCES] = "auto"
    """What computes the proximal policy's log-probs. auto: the first source that provides what the variant needs: snapshot for
    OLD, arrival for ASYNC, ewma for EWMA, aged, rescore, balance, or none where none is needed."""
    current_version: Literal["training-forward", "scored"] = "training-forward"
    """OLD of tokens of the version that enters training, in its first optimizer step. training-forward: what the forward pass
    of that step gives them, which is OLD by definition; it saves a forward pass, and one in 16 of their trajectories is scored
    all the same, as a check. scored: as all other tokens; objective.loss_aggregation = "token-mean-kept", objective.loss =
    "m2po" and correction.normalise need that in any case."""
    scoring: Literal["prefix", "same-shape"] = "prefix"
    """How a batch's tokens of older versions are scored. prefix: each trajectory up to its last token of the version.
    same-shape: in the very micro-batches that train them, which leaves no packing noise in bf16 and reads more tokens
    (docs/exactness.md)."""
    accept_mixed_kv: bool = False
    """engine.kv = "stale" with source snapshot only: tokens that were sampled over keys and values of older versions are scored
    at their own version over keys and values of those versions, and are labelled mixed_kv."""
    scorer_versions: Annotated[int, Ge(1), Le(10_000)] = 2
    """dedicated only: the newest versions that the scorer holds; tokens of older ones are scored from the trainer's store."""
    decay: Literal["fixed", "max-lag", "mean-lag", "auto", "audited"] = "max-lag"
    """ewma and aged: how beta is chosen. fixed: proximal.beta. max-lag: W / (W + 2), W the largest lag. mean-lag:
    m / (1 + m), m the measured token-weighted mean lag. auto: the smallest expected error over the measured lags
    (docs/ewma.md). audited: the same, from how far log-probs of audited batches have moved; ewma only, with audit.share
    above 0."""
    beta: Decay = 0.0
    """decay = "fixed" only, and then above 0: the decay of the average from one version to the next."""
    reset: Literal["none", "paper", "guarded", "audited"] = "none"
    """ewma and aged: when the average is reset to the live weights. paper: rho < proximal.reset_below. guarded: and the
    band would keep more tokens with the live weights, and none of the last W versions was a reset. audited: where the exact
    audit of a batch shows that the live weights would have decided more like OLD, by count and by weight."""
    reset_below: Annotated[float, Gt(0), Le(1)] = 0.9
    """The rho, the share of tokens that stay active, below which proximal.reset = "paper" or "guarded" asks for a reset."""

    @property
    def follows_audit(self) -> bool:
        """Whether the average is formed by what the exact audit finds."""
        return "audited" in (self.decay, self.reset)
