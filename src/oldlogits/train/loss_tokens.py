"""The loss tokens of a batch: what a loss reads of them, what an update records of them, and the per-token table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oldlogits.batch.collate import TokenBatch
from oldlogits.core.errors import MissingLogprobError
from oldlogits.core.loss import LossInputs, LossTerms
from oldlogits.core.policies import MU, OLD, PROXIMAL_PROVENANCE, REFERENCE, THETA, Policy, Provenance
from oldlogits.core.scoring import Scored
from oldlogits.models.ranks import Ranks

Column = NDArray[np.generic]

MASKS: Final = ("band_mask", "clip_mask", "active_mask")


@dataclass(frozen=True, slots=True, kw_only=True)
class LossTokens:
    """The loss tokens of a batch as tensors, in batch order.

    Args:
        flat: int64 [token]; the index of each token in the flat batch.
        advantages: float32 [token].
        staleness: int64 [token].
        step: int64 [token]; the optimizer step that trains the token.
        sequence: int64 [token]; the trajectory that the token belongs to.
        num_sequences: The number of trajectories of the batch.
        old_is_theta: bool [token]; OLD of the token is THETA of its optimizer step, whatever a source gave.
        left_out: bool [token]; the source gave no value, and `logp` is NaN.
        logp: float32 [token] by policy: MU, the policy that a source provided, and REFERENCE where the batch has it.
    """

    flat: NDArray[np.int64]
    advantages: Tensor
    staleness: Tensor
    step: Tensor
    sequence: Tensor
    num_sequences: int
    old_is_theta: Tensor
    left_out: Tensor
    logp: Mapping[Policy, Tensor]

    @classmethod
    def of(cls, batch: TokenBatch, scored: Scored | None, version: int, *, takes_theta: bool = False) -> LossTokens:
        """Gather the loss tokens of a batch that enters training at `version`, on the CPU.

        With `takes_theta` the training forward gives OLD of the tokens of its own version.

        Raises:
            MissingLogprobError: A token is left out, and nothing else gives its OLD.
        """
        flat = np.flatnonzero(batch.loss_mask)
        sequence = batch.sequence[flat]
        logp = {MU: torch.from_numpy(batch.logp_mu[flat])}
        old_is_theta = batch.old_is_theta(version) if takes_theta else np.zeros(len(flat), np.bool_)
        left_out = np.zeros(len(flat), np.bool_)
        if scored is not None:
            left_out = left_out if scored.left_out is None else scored.left_out
            if missing := np.count_nonzero(left_out & ~old_is_theta):
                raise MissingLogprobError(
                    f"{missing} tokens have no log-prob of {scored.policy.name}",
                    got="a source that left them out",
                    allowed="tokens of the current version, in the first optimizer step",
                    fix="score them",
                )
            logp[scored.policy] = torch.from_numpy(scored.values)
        if batch.logp_reference is not None:
            logp[REFERENCE] = torch.from_numpy(batch.logp_reference)
        return cls(
            flat=flat,
            advantages=torch.from_numpy(
                batch.advantages[sequence] if batch.token_advantages is None else batch.token_advantages
            ),
            staleness=torch.from_numpy(version - batch.version[flat]),
            step=torch.from_numpy(batch.step[sequence]),
            sequence=torch.from_numpy(sequence),
            num_sequences=batch.num_sequences,
            old_is_theta=torch.from_numpy(old_is_theta),
            left_out=torch.from_numpy(left_out),
            logp=logp,
        )

    def to(self, device: torch.device) -> LossTokens:
        """Copy the tensors to a device."""
        moved = {
            name: getattr(self, name).to(device)
            for name in ("advantages", "staleness", "step", "sequence", "old_is_theta", "left_out")
        }
        return replace(self, logp={policy: values.to(device) for policy, values in self.logp.items()}, **moved)

    def inputs(self, here: Tensor, logp: Mapping[Policy, Tensor], step_mask: Tensor | None = None) -> LossInputs:
        """Select what a loss reads of a micro-batch: the loss tokens at the positions `here`, and their log-probs.

        `step_mask` is that of all loss tokens, where the loss has a rule over the optimizer step.
        """
        return LossInputs(
            logp=logp,
            advantages=self.advantages[here],
            loss_mask=torch.ones_like(here, dtype=torch.bool),
            staleness=self.staleness[here],
            sequence_index=self.sequence[here],
            num_sequences=self.num_sequences,
            step_mask=None if step_mask is None else step_mask[here],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRecord:
    """What the update saw of every loss token, at the step that trained it. All tensors are [token], without gradients."""

    theta: Tensor
    entropy: Tensor
    proximal: Tensor
    log_r_d: Tensor
    log_r_s: Tensor
    band_mask: Tensor
    clip_mask: Tensor
    active_mask: Tensor

    @classmethod
    def empty(cls, num_tokens: int, device: torch.device) -> TokenRecord:
        """Make a record of tokens none of which was trained yet."""
        names = [field.name for field in fields(cls)]
        numbers = {name: torch.full((num_tokens,), math.nan, device=device) for name in names if name not in MASKS}
        return cls(**numbers, **{name: torch.zeros(num_tokens, dtype=torch.bool, device=device) for name in MASKS})

    @property
    def _columns(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self)]

    def cpu(self) -> TokenRecord:
        """Copy the record to the CPU."""
        return TokenRecord(**{field.name: getattr(self, field.name).cpu() for field in fields(self)})

    def clear(self, chosen: Tensor) -> None:
        """Set the chosen tokens to 0, before each of them is trained by one rank."""
        for column in self._columns:
            column.masked_fill_(chosen, 0)

    def put(self, here: Tensor, logp: Mapping[Policy, Tensor], entropy: Tensor, proximal: Policy, terms: LossTerms) -> None:
        """Record what the loss made of a micro-batch; `here` says where its tokens stand among the loss tokens."""
        self.entropy[here] = entropy
        self.theta[here] = logp[THETA].detach()
        self.proximal[here] = logp[proximal].detach()
        for name in ("log_r_d", "log_r_s", *MASKS):
            getattr(self, name)[here] = getattr(terms, name).detach()

    def share(self, chosen: Tensor, ranks: Ranks) -> None:
        """Give every rank what the others have recorded of the chosen tokens."""
        if ranks.num_ranks == 1:
            return
        for column in self._columns:
            column[chosen] = ranks.sum(column[chosen].float()).to(column.dtype)


def provenance_label(proximal: Policy, scored: Scored | None) -> Provenance:
    """Tell how the proximal policy's values were obtained, where keys and values were fresh."""
    if scored is not None and scored.policy is proximal and scored.provenance is not None:
        return scored.provenance
    return PROXIMAL_PROVENANCE[proximal]


def count_provenance(mixed_kv: NDArray[np.bool_], proximal: Policy, label: Provenance) -> dict[str, int]:
    """Count loss tokens by provenance. OLD over stale keys and values has a label of its own; other policies keep theirs."""
    mixed = int(mixed_kv.sum()) if proximal is OLD else 0
    counts = {label.value: len(mixed_kv) - mixed, Provenance.MIXED_KV.value: mixed}
    return {name: count for name, count in counts.items() if count}


def token_table(
    batch: TokenBatch, tokens: LossTokens, record: TokenRecord, *, proximal: Policy, label: Provenance, version: int
) -> Mapping[str, Column]:
    """Lay out one row per loss token of a batch; `label` is its provenance. docs/run-folder.md describes the columns.

    The context tokens before each loss token follow each other in one array of their own: `index` tells where each belongs.
    """
    flat = tokens.flat
    sequence = tokens.sequence.numpy()
    last = np.full(batch.num_sequences, -1, np.int64)
    last[sequence] = flat  # ascending: the last one of each stays
    is_read = ~batch.loss_mask & (np.arange(batch.num_tokens) < last[batch.sequence])
    mixed = batch.mixed_kv[flat] & (proximal is OLD)
    return {
        "trajectory": np.array(batch.trajectory_ids)[sequence],
        "index": (flat - batch.starts[sequence]).astype(np.int32),
        "token_id": batch.token_ids[flat].astype(np.int32),
        "version": batch.version[flat].astype(np.int32),
        "trainer_version": np.full(len(flat), version, np.int32),
        "staleness": tokens.staleness.numpy().astype(np.int32),
        "provenance": np.where(mixed, Provenance.MIXED_KV.value, label.value),
        "reward": batch.rewards[sequence],
        "advantage": tokens.advantages.numpy(),
        "logp_mu": batch.logp_mu[flat],
        "logp_proximal": record.proximal.numpy(),
        "logp_theta": record.theta.numpy(),
        "log_r_d": record.log_r_d.numpy(),
        "log_r_s": record.log_r_s.numpy(),
        "loss_mask": np.ones(len(flat), np.bool_),
        "band_mask": record.band_mask.numpy(),
        "clip_mask": record.clip_mask.numpy(),
        "active_mask": record.active_mask.numpy(),
        "step": tokens.step.numpy().astype(np.int32),
        "temperature": batch.temperature[flat],
        "mixed_kv": batch.mixed_kv[flat],
        "context": batch.token_ids[is_read].astype(np.int32),
    }
