"""The loss tokens of a batch: what the objective reads of them, and what an update has seen of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oldlogits.batch import TokenBatch
from oldlogits.core.policies import MU, Policy
from oldlogits.core.scoring import Scored
from oldlogits.models.ranks import Ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class LossTokens:
    """The loss tokens of a batch as tensors, in batch order: what the objective reads.

    Args:
        flat: int64 [token]; index in the flat batch.
        advantages: float32 [token].
        staleness: int64 [token].
        step: int64 [token]; the optimizer step that trains it.
        sequence: int64 [token].
        logp: float32 [token] by policy: MU, and the proximal policy where a source provides it.
    """

    flat: NDArray[np.int64]
    advantages: Tensor
    staleness: Tensor
    step: Tensor
    sequence: Tensor
    logp: Mapping[Policy, Tensor]

    @classmethod
    def of(cls, batch: TokenBatch, scored: Scored | None, version: int) -> LossTokens:
        """Gather the loss tokens of a batch that enters training at `version`, on the CPU."""
        flat = np.flatnonzero(batch.loss_mask)
        sequence = batch.sequence[flat]
        logp = {MU: torch.from_numpy(batch.logp_mu[flat])}
        if scored is not None:
            logp[scored.policy] = torch.from_numpy(scored.values)
        return cls(
            flat=flat,
            advantages=torch.from_numpy(batch.advantages[sequence]),
            staleness=torch.from_numpy(version - batch.version[flat]),
            step=torch.from_numpy(batch.step[sequence]),
            sequence=torch.from_numpy(sequence),
            logp=logp,
        )

    def to(self, device: torch.device) -> LossTokens:
        """The same on a device."""
        return LossTokens(
            flat=self.flat,
            advantages=self.advantages.to(device),
            staleness=self.staleness.to(device),
            step=self.step.to(device),
            sequence=self.sequence.to(device),
            logp={policy: values.to(device) for policy, values in self.logp.items()},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """Detached values of every loss token, at the step that trained it."""

    theta: Tensor
    proximal: Tensor
    log_r_d: Tensor
    log_r_s: Tensor
    band_mask: Tensor
    clip_mask: Tensor
    active_mask: Tensor

    @classmethod
    def empty(cls, num_tokens: int, device: torch.device) -> Seen:
        """Of so many tokens, none of them seen."""
        floats = (torch.full((num_tokens,), math.nan, device=device) for _ in range(4))
        masks = (torch.zeros(num_tokens, dtype=torch.bool, device=device) for _ in range(3))
        theta, proximal, log_r_d, log_r_s = floats
        band_mask, clip_mask, active_mask = masks
        return cls(
            theta=theta,
            proximal=proximal,
            log_r_d=log_r_d,
            log_r_s=log_r_s,
            band_mask=band_mask,
            clip_mask=clip_mask,
            active_mask=active_mask,
        )

    @property
    def _columns(self) -> tuple[Tensor, ...]:
        masks = (self.band_mask, self.clip_mask, self.active_mask)
        return (self.theta, self.proximal, self.log_r_d, self.log_r_s, *masks)

    def cpu(self) -> Seen:
        """The same on the CPU."""
        return Seen(**{field.name: getattr(self, field.name).cpu() for field in fields(self)})

    def begin(self, chosen: Tensor) -> None:
        """The chosen tokens are about to be seen, each by one rank."""
        for column in self._columns:
            column.masked_fill_(chosen, 0)

    def share(self, chosen: Tensor, ranks: Ranks) -> None:
        """Let every rank see what the others have seen of the chosen tokens."""
        if ranks.num_ranks == 1:
            return
        for column in self._columns:
            column[chosen] = ranks.sum(column[chosen].float()).to(column.dtype)
