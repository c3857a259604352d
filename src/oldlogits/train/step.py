"""The optimizer steps on one batch: score THETA, form the objective, step.

for each optimizer step:
    weights = 1 / N over the whole step                     (token_weights: known before the first micro-batch)
    for each micro-batch of this rank:
        logp[THETA] -> split_ratio -> surrogate -> loss.backward()
    sum over the ranks: the gradient while it is computed, then the loss and what was seen
    clip the gradient by its norm over all ranks -> AdamW
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from oldlogits.batch import Dealt, TokenBatch, deal
from oldlogits.config import RunConfig
from oldlogits.core.errors import MissingLogprobError, NonFiniteError
from oldlogits.core.policies import LINEAR, LOGLINEAR, MU, OLD, PROXIMAL_PROVENANCE, THETA, Policy, Provenance, find_variant
from oldlogits.core.scoring import Scored
from oldlogits.models.ranks import ALONE, Ranks
from oldlogits.models.scorer import ForwardSizes, action_logps, score_tokens
from oldlogits.models.sharding import whole
from oldlogits.objective import (
    SplitRatio,
    Surrogate,
    a3po_weight_mu,
    diagnose,
    kept_mask,
    linear_logp,
    log_discrepancy,
    loglinear_logp,
    split_ratio,
    surrogate,
    to_metrics,
    token_weights,
    weighted_loss,
)
from oldlogits.train.average import AverageReset
from oldlogits.train.consistency import CONSISTENCY_TOLERANCE, check_consistency, is_routed, judged_error, num_excused
from oldlogits.train.loss_tokens import LossTokens, Seen
from oldlogits.train.optimizer import Optimizer

Column = NDArray[np.generic]

INTERPOLATE = {LINEAR: linear_logp, LOGLINEAR: loglinear_logp}


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateResult:
    """What one update did.

    Args:
        metrics: ``area/name`` to number; see docs/metrics.md.
        staleness_counts: Loss tokens by staleness.
        provenance: Loss tokens by `Provenance`.
        lag0_max_abs_error: Largest ``|log r_s|`` of lag-0 tokens before the first optimizer step, where the stand-in
            is OLD; NaN where there is no such token. Exactly 0 up to rounding, but for ties between experts, or OLD is not
            what it claims to be.
        table: One row per loss token, for the per-token Parquet table.
        average_reset: Why the weight average was reset after it; None: it was not, or there is none.
    """

    metrics: Mapping[str, float]
    staleness_counts: Mapping[int, int]
    provenance: Mapping[str, int]
    lag0_max_abs_error: float
    table: Mapping[str, Column]
    average_reset: AverageReset | None = None


def update(
    model: PreTrainedModel,
    optimizer: Optimizer,
    batch: TokenBatch,
    scored: Scored | None,
    *,
    version: int,
    config: RunConfig,
    ranks: Ranks = ALONE,
) -> UpdateResult:
    """Train one batch in ``trainer.minibatches_per_update`` optimizer steps.

    Args:
        model: Holds the live weights THETA.
        optimizer: Over the model's parameters.
        batch: The trajectories.
        scored: The stand-in's log-probs, or None for a variant that needs no source.
        version: The trainer's version before the first step.
        config: The run.
        ranks: That hold the model; all make this call with the same batch, and return the same.

    Raises:
        MissingLogprobError: The variant needs log-probs that `scored` does not hold.
        NonFiniteError: A loss or a gradient is not finite.
        ExactnessError: OLD differs from THETA on lag-0 tokens before the first step; nothing was stepped.
    """
    variant = find_variant(config.variant)
    tokens = LossTokens.of(batch, scored, version)
    missing = [policy.name for policy in variant.needs if policy not in tokens.logp]
    if missing:
        raise MissingLogprobError(
            f"variant '{config.variant}' needs log-probs of {', '.join(missing)}",
            got="none for this batch",
            allowed="one per loss token",
            fix="pass the batch through its source first",
        )
    there, seen = tokens.to(model.device), Seen.empty(len(tokens.flat), model.device)
    losses, norms, lag0 = [], [], math.nan
    lag0_above: Mapping[str, float] = {}
    for step in range(config.trainer.minibatches_per_update):
        optimizer.zero_grad()
        losses.append(_accumulate(model, batch, there, step, seen, config, ranks))
        norms.append(whole(torch.nn.utils.clip_grad_norm_(model.parameters(), config.trainer.max_grad_norm)))
        if step == 0 and variant.stand_in is OLD:
            lag0, lag0_above = _witness_lag0(model, tokens, seen.cpu(), torch.from_numpy(batch.mixed_kv[tokens.flat]))
        _check_finite(losses[-1], norms[-1], version, step)
        optimizer.step()
    seen = seen.cpu()
    metrics = {
        "loss/value": float(torch.stack(losses).mean()),
        "grad/norm": float(torch.stack(norms).mean()),
        "grad/norm_max": float(torch.stack(norms).max()),
        **_diagnostics(tokens, seen, config),
        **_band_shares(tokens, seen, config.band),
        **lag0_above,
        "mask/num_truncated": _num_truncated(seen, config),
    }
    label = _label(variant.stand_in, scored)
    return UpdateResult(
        metrics=metrics,
        staleness_counts=_counts(tokens.staleness.numpy()),
        provenance=_provenance(batch.mixed_kv[tokens.flat], variant.stand_in, label),
        lag0_max_abs_error=lag0,
        table=_table(batch, tokens, seen, variant.stand_in, label, version),
    )


def recipe_surrogate(split: SplitRatio, advantages: Tensor, loss_mask: Tensor, config: RunConfig) -> Surrogate:
    """`surrogate` under the recipe's band, clip and discrepancy; all tensors [token]."""
    objective = config.objective
    return surrogate(
        split,
        advantages,
        loss_mask,
        band=config.band,
        eps_low=objective.eps_low,
        eps_high=objective.eps_high,
        dual_clip=None if math.isinf(objective.dual_clip) else objective.dual_clip,
        discrepancy=objective.mismatch_correction,
        truncation=objective.is_cap if objective.clip == "truncated" else None,
    )


def _accumulate(
    model: PreTrainedModel,
    batch: TokenBatch,
    tokens: LossTokens,
    step: int,
    seen: Seen,
    config: RunConfig,
    ranks: Ranks,
) -> Tensor:
    """Accumulate the gradient of one optimizer step; returns its loss (0-d, detached).

    Ranks average their gradients: each computes that of its own micro-batches times the number of ranks.
    """
    variant = find_variant(config.variant)
    chosen = tokens.step == step
    weights = _step_weights(model, batch, tokens, chosen, config, ranks)
    total = torch.zeros((), device=weights.device)
    seen.begin(chosen)
    for one in _dealt(batch, tokens, chosen, config, ranks):
        micro = one.micro
        here = torch.from_numpy(np.searchsorted(tokens.flat, micro.flat.numpy())).to(weights.device)
        theta = action_logps(model, micro, head_chunk_tokens=config.trainer.head_chunk_tokens)
        logp = {policy: values[here] for policy, values in tokens.logp.items()} | {THETA: theta}
        if variant.stand_in in INTERPOLATE:
            logp[variant.stand_in] = _interpolate(variant.stand_in, logp[MU], theta, tokens.staleness[here], config)
        split = split_ratio(variant, logp)
        terms = recipe_surrogate(split, tokens.advantages[here], torch.ones_like(here, dtype=torch.bool), config)
        loss = weighted_loss(terms.values, weights[here] * float(one.counts))
        (loss * ranks.num_ranks).backward()  # type: ignore[no-untyped-call]
        if not one.counts:
            continue
        total += loss.detach()
        seen.theta[here] = theta.detach()
        seen.stand_in[here] = logp[variant.stand_in].detach()
        seen.log_r_d[here] = split.log_r_d
        seen.log_r_s[here] = split.log_r_s.detach()
        seen.band_mask[here] = terms.band_mask
        seen.clip_mask[here] = terms.clip_mask
        seen.active_mask[here] = terms.active_mask
    seen.share(chosen, ranks)
    return ranks.sum(total)


def _dealt(batch: TokenBatch, tokens: LossTokens, chosen: Tensor, config: RunConfig, ranks: Ranks) -> Iterator[Dealt]:
    """This rank's micro-batches of the chosen tokens."""
    flat = tokens.flat[chosen.cpu().numpy()]
    return deal(batch, flat, config.trainer.micro_batch_tokens, rank=ranks.rank, num_ranks=ranks.num_ranks)


def _step_weights(
    model: PreTrainedModel, batch: TokenBatch, tokens: LossTokens, chosen: Tensor, config: RunConfig, ranks: Ranks
) -> Tensor:
    """Each token's share of the loss of its optimizer step; 0 for tokens of other steps."""
    objective, variant = config.objective, find_variant(config.variant)
    kept = chosen
    if objective.loss_aggregation == "token-mean-kept":
        logp = dict(tokens.logp)
        if variant.stand_in in INTERPOLATE and not variant.r_d.is_one:
            theta = torch.zeros(len(tokens.flat), device=chosen.device)
            t = config.trainer
            sizes: ForwardSizes = {"micro_batch_tokens": t.micro_batch_tokens, "head_chunk_tokens": t.head_chunk_tokens}
            scores = score_tokens(model, batch, tokens.flat[chosen.cpu().numpy()], **sizes, ranks=ranks)
            theta[chosen] = torch.from_numpy(scores).to(chosen.device)
            logp[variant.stand_in] = _interpolate(variant.stand_in, logp[MU], theta, tokens.staleness, config)
        kept = kept_mask(log_discrepancy(variant, logp), chosen, config.band)
    return token_weights(
        chosen,
        mode=objective.loss_aggregation,
        sequence_index=tokens.sequence,
        num_sequences=batch.num_sequences,
        kept_mask=kept,
        constant=objective.loss_aggregation_tokens,
    )


def _interpolate(stand_in: Policy, logp_mu: Tensor, theta: Tensor, staleness: Tensor, config: RunConfig) -> Tensor:
    """The interpolated stand-in, under the recipe's weight on MU or that of each token's staleness."""
    objective = config.objective
    weight_mu = a3po_weight_mu(staleness) if objective.interpolation_schedule == "a3po" else objective.interpolation_mu
    return INTERPOLATE[stand_in](logp_mu, theta, weight_mu)


def _witness_lag0(
    model: PreTrainedModel, tokens: LossTokens, seen: Seen, mixed_kv: Tensor
) -> tuple[float, Mapping[str, float]]:
    """Witness (b): before the first optimizer step, THETA equals OLD on tokens of the current version and fresh entries.

    Returns:
        The largest difference in nats, NaN for none, and the metrics of a mixture of experts.
    """
    consistency = (tokens.step == 0) & (tokens.staleness == 0) & ~mixed_kv
    errors = seen.log_r_s[consistency].abs().numpy()
    routed = is_routed(model)
    excused = num_excused(tokens.sequence[consistency].numpy(), routed=routed)
    check_consistency(judged_error(errors, excused), "OLD of lag-0 tokens", "THETA before the first optimizer step")
    above = {"consistency/num_lag0_above": float(np.count_nonzero(errors > CONSISTENCY_TOLERANCE))} if routed else {}
    return judged_error(errors, 0), above


def _check_finite(loss: Tensor, norm: Tensor, version: int, step: int) -> None:
    if not bool(torch.isfinite(loss + norm)):
        raise NonFiniteError(
            f"the loss or its gradient is not finite at version {version}, optimizer step {step}",
            got=f"loss {float(loss)}, gradient norm {float(norm)}",
            allowed="finite numbers",
            fix="lower trainer.lr, tighten the band, or inspect the saved batch",
        )


def _diagnostics(tokens: LossTokens, seen: Seen, config: RunConfig) -> dict[str, float]:
    return to_metrics(
        diagnose(
            seen.log_r_d,
            seen.log_r_s,
            band_mask=seen.band_mask,
            clip_mask=seen.clip_mask,
            loss_mask=torch.ones_like(seen.band_mask),
            staleness=tokens.staleness,
            advantages=tokens.advantages,
            num_staleness=config.max_staleness + 1,
        )
    )


def _band_shares(tokens: LossTokens, seen: Seen, band: float) -> dict[str, float]:
    """What the band keeps of the first step's tokens: with the stand-in in r_d, and with the weights before that step."""
    first = tokens.step == 0
    all_of_them, mu = first[first], tokens.logp[MU][first]

    def share(logp: Tensor) -> float:
        return float(kept_mask(logp[first] - mu, all_of_them, band).float().mean())

    return {"mask/rho_band_first": share(seen.stand_in), "mask/rho_band_live": share(seen.theta)}


def _num_truncated(seen: Seen, config: RunConfig) -> int:
    """Finite loss tokens whose r_s exceeds the truncation; 0 where the clip is PPO's."""
    truncation = config.objective.is_cap if config.objective.clip == "truncated" else math.inf
    return int((seen.clip_mask & (seen.log_r_s > math.log(truncation))).sum())


def _counts(values: NDArray[np.int64]) -> dict[int, int]:
    kinds, counts = np.unique(values, return_counts=True)
    return {int(kind): int(count) for kind, count in zip(kinds, counts, strict=True)}


def _label(stand_in: Policy, scored: Scored | None) -> Provenance:
    """How the stand-in's values were obtained, where keys and values were fresh."""
    if scored is not None and scored.policy is stand_in and scored.provenance is not None:
        return scored.provenance
    return PROXIMAL_PROVENANCE[stand_in]


def _provenance(mixed_kv: NDArray[np.bool_], stand_in: Policy, label: Provenance) -> dict[str, int]:
    """OLD over stale keys and values is labelled so; other stand-ins keep their own label."""
    mixed = int(mixed_kv.sum()) if stand_in is OLD else 0
    counts = {label.value: len(mixed_kv) - mixed, Provenance.MIXED_KV.value: mixed}
    return {name: count for name, count in counts.items() if count}


def _table(
    batch: TokenBatch, tokens: LossTokens, seen: Seen, stand_in: Policy, label: Provenance, version: int
) -> dict[str, Column]:
    flat = tokens.flat
    sequence = tokens.sequence.numpy()
    mixed = batch.mixed_kv[flat] & (stand_in is OLD)
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
        "logp_prox": seen.stand_in.numpy(),
        "logp_theta": seen.theta.numpy(),
        "log_r_d": seen.log_r_d.numpy(),
        "log_r_s": seen.log_r_s.numpy(),
        "loss_mask": np.ones(len(flat), np.bool_),
        "band_mask": seen.band_mask.numpy(),
        "clip_mask": seen.clip_mask.numpy(),
        "active_mask": seen.active_mask.numpy(),
    }
