"""The per-token table of an update, and where the proximal policy's log-probs came from."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from oldlogits.batch import TokenBatch
from oldlogits.core.policies import OLD, PROXIMAL_PROVENANCE, Policy, Provenance
from oldlogits.core.scoring import Scored
from oldlogits.train.loss_tokens import LossTokens, TokenRecord

Column = NDArray[np.generic]


def provenance_label(proximal: Policy, scored: Scored | None) -> Provenance:
    """How the proximal policy's values were obtained, where keys and values were fresh."""
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
    """Lay out one row per loss token of a batch; `label` is its provenance. docs/run-folder.md describes the columns."""
    flat = tokens.flat
    sequence = tokens.sequence.numpy()
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
    }
