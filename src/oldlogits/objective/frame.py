"""What every loss but the paper's own starts from and ends with: finite ratios of the variant, and terms with r_d corrected.

A loss is then two formulas: the surrogate of a token without r_d, and its derivative with respect to the token's log-prob.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from oldlogits.core.errors import MissingLogprobError
from oldlogits.core.loss import LossInputs, LossTerms, Objective
from oldlogits.core.objective.correction import Level
from oldlogits.core.objective.shapes import Bool, Float
from oldlogits.core.policies import MU, THETA
from oldlogits.objective.correct import corrected
from oldlogits.objective.levels import at_level
from oldlogits.objective.masks import finite_mask
from oldlogits.objective.ratios import SplitRatio, split_ratio
from oldlogits.objective.surrogate import LARGEST_LOG


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """The tokens of a micro-batch under a variant. All tensors are [token] and detached; what is not finite is 0.

    Args:
        tokens: What the loss was given.
        objective: The knobs.
        split: Both log-ratios as they are, not finite ones included.
        counted: Loss tokens whose ratios and advantage are finite.
        log_r_s: ``log r_s``, within [-20, 20].
        advantages: The advantages.
    """

    tokens: LossInputs
    objective: Objective
    split: SplitRatio
    counted: Bool[Tensor, " token"]
    log_r_s: Float[Tensor, " token"]
    advantages: Float[Tensor, " token"]

    @classmethod
    def of(cls, tokens: LossInputs, objective: Objective) -> Frame:
        """Form the ratios.

        Raises:
            MissingLogprobError: A policy of the variant is not among the log-probs.
        """
        split = split_ratio(objective.variant, tokens.logp)
        log_r_s = split.log_r_s.detach()
        counted = tokens.loss_mask & finite_mask(split.log_r_d, log_r_s, tokens.advantages)
        return cls(
            tokens=tokens,
            objective=objective,
            split=split,
            counted=counted,
            log_r_s=torch.where(counted, log_r_s, 0.0).clamp(-LARGEST_LOG, LARGEST_LOG),
            advantages=torch.where(counted, tokens.advantages, 0.0),
        )

    @property
    def r_s(self) -> Tensor:
        """The ratio r_s of each token."""
        return self.log_r_s.exp()

    @property
    def log_theta(self) -> Tensor:
        """The log-prob of THETA, detached; 0 for a token that is not counted."""
        return torch.where(self.counted, self.tokens.logp[THETA].detach(), 0.0)

    @property
    def log_proximal(self) -> Tensor:
        """The log-prob of the policy that r_s is over, detached; 0 for a token that is not counted."""
        return torch.where(self.counted, self.tokens.logp[self.objective.variant.proximal].detach(), 0.0)

    def at_level(self, level: Level) -> Tensor:
        """Give every token ``log r_s`` of its sequence at a level, within [-20, 20]."""
        return self.mean_or_sum(self.split.log_r_s.detach(), level).clamp(-LARGEST_LOG, LARGEST_LOG)

    def mean_or_sum(self, values: Tensor, level: Level, counted: Tensor | None = None) -> Tensor:
        """Give every token a value of its sequence, as `at_level` does, over its counted tokens."""
        index, num = self.tokens.sequence_index, self.tokens.num_sequences
        counted = self.counted if counted is None else counted
        return at_level(values, level, counted=counted, sequence_index=index, num_sequences=num)

    def log_total(self) -> tuple[Tensor, Tensor]:
        """Give ``log theta / mu``, 0 where it is not finite, and the counted tokens where it is.

        Raises:
            MissingLogprobError: MU is not among the log-probs.
        """
        if MU not in self.tokens.logp:
            raise MissingLogprobError(
                "log-probs of MU are missing",
                got=", ".join(policy.name for policy in self.tokens.logp),
                allowed="those of MU, for a loss that compares THETA with it",
                fix="pass the engine's log-probs",
            )
        total = self.tokens.logp[THETA].detach() - self.tokens.logp[MU].detach()
        counted = self.counted & total.isfinite()
        return torch.where(counted, total, 0.0), counted

    def terms(self, values: Tensor, slope: Tensor, *, kept: Tensor | None = None, log_ratio: Tensor | None = None) -> LossTerms:
        """Make the loss's terms, r_d included.

        Args:
            values: The surrogate of each token without r_d.
            slope: Its derivative with respect to the token's log-prob of THETA.
            kept: False for a token that has no gradient because of r_s; by default all have one.
            log_ratio: The log-ratio that the loss clipped, where that is not the token's own.
        """
        own = self.split.log_r_s.detach()
        terms = LossTerms(
            values=values,
            log_r_d=self.split.log_r_d,
            log_r_s=own if log_ratio is None else torch.where(self.counted, log_ratio, own),
            band_mask=self.counted | ~self.tokens.loss_mask,
            clip_mask=self.counted if kept is None else self.counted & kept,
        )
        return corrected(terms, slope, self.tokens, self.objective, self.split.log_r_s)
