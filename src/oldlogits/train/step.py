"""The optimizer steps on one batch: score THETA, form the loss, step.

for each optimizer step:
    weights = 1 / N over the whole step                     (token_weights: known before the first micro-batch)
    for each micro-batch of this rank, which holds whole sequences:
        logp[THETA] -> loss(tokens, objective) -> -sum weights * values -> backward
    sum over the ranks: the gradient while it is computed, then the loss and the record of the tokens
    clip the gradient by its norm over all ranks -> AdamW
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from oldlogits.batch.collate import TokenBatch
from oldlogits.batch.pad import MicroBatch
from oldlogits.core.errors import MissingLogprobError, NonFiniteError
from oldlogits.core.loss import LOSSES, STEP_RULES, card_of
from oldlogits.core.policies import LINEAR, LOGLINEAR, MU, OLD, REFERENCE, THETA, Policy
from oldlogits.core.scoring import Scored
from oldlogits.models.ranks import ALONE, Ranks
from oldlogits.models.routing import take_counts
from oldlogits.models.scorer import action_logps, action_logps_and_entropies, rank_micro_batches, score_tokens
from oldlogits.models.sharding import whole
from oldlogits.objective import (
    KlEstimator,
    a3po_weight_mu,
    correct,
    diagnose,
    kept_mask,
    kl_estimate,
    linear_logp,
    log_discrepancy,
    loglinear_logp,
    mean_weight,
    regularised,
    to_metrics,
    token_weights,
    weighted_loss,
)
from oldlogits.train.consistency import CONSISTENCY_TOLERANCE, check_rescored, is_routed, judged_error, num_excused
from oldlogits.train.loss_tokens import Column, LossTokens, TokenRecord, count_provenance, provenance_label, token_table
from oldlogits.train.optimizer import Optimizer
from oldlogits.train.reports import NO_NOISE, PackingNoise
from oldlogits.train.spec import TrainerSpec
from oldlogits.train.weights.average import AverageReset

KL_METRICS: Final[tuple[KlEstimator, ...]] = ("k1", "k3")
INTERPOLATE = {LINEAR: linear_logp, LOGLINEAR: loglinear_logp}


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateResult:
    """What one update did.

    Args:
        metrics: ``area/name`` to number; see docs/metrics.md.
        staleness_counts: Loss tokens by staleness.
        provenance: Loss tokens by `Provenance`.
        lag0_max_abs_error: Largest ``|log theta - log old|`` of lag-0 tokens before the first step, where the proximal
            policy is OLD, as the loss used it; NaN where there is no such token. Exactly 0 where the training forward gave it.
        rescored_max_abs_error: The same for OLD as the source scored it: packing noise, ties between experts, or OLD is not
            what it claims to be.
        table: One row per loss token, for the per-token Parquet table.
        average_reset: Why the weight average was reset after it; None: it was not, or there is none.
    """

    metrics: Mapping[str, float]
    staleness_counts: Mapping[int, int]
    provenance: Mapping[str, int]
    lag0_max_abs_error: float
    rescored_max_abs_error: float = math.nan
    table: Mapping[str, Column]
    average_reset: AverageReset | None = None


def update(
    model: PreTrainedModel,
    optimizer: Optimizer,
    batch: TokenBatch,
    scored: Scored | None,
    *,
    version: int,
    spec: TrainerSpec,
    ranks: Ranks = ALONE,
    noise: PackingNoise = NO_NOISE,
) -> UpdateResult:
    """Train one batch in ``trainer.minibatches_per_update`` optimizer steps, after which the version is `version` + 1.

    `scored` is the proximal policy's log-probs; None for a variant that needs no source. `noise` is what another packing of
    the same tokens does to their log-probs. All ranks that hold the model make this call with the same batch, and return the
    same.
    """
    proximal = spec.knobs.variant.proximal
    tokens = LossTokens.of(batch, scored, version, takes_theta=spec.takes_training_forward)
    _check_policies(tokens, spec)
    there, record = tokens.to(model.device), TokenRecord.empty(len(tokens.flat), model.device)
    losses, norms, scales, num_read, lag0, rescored = [], [], list[float](), [], math.nan, math.nan
    lag0_above: Mapping[str, float] = {}
    first_lr = optimizer.lr
    for step in range(spec.trainer.minibatches_per_update):
        optimizer.zero_grad()
        loss, read = _accumulate(model, batch, there, step, record, spec, ranks)
        losses.append(loss)
        num_read.append(read)
        norms.append(whole(torch.nn.utils.clip_grad_norm_(model.parameters(), spec.trainer.max_grad_norm)))
        if step == 0 and proximal is OLD and spec.trains_own_tokens:
            mixed_kv = torch.from_numpy(batch.mixed_kv[tokens.flat])
            may_tie = is_routed(model) and spec.model.routing != "replayed"
            lag0, rescored, lag0_above = _check_lag0(tokens, record.cpu(), mixed_kv, noise, may_tie=may_tie)
        _check_finite(losses[-1], norms[-1], version, step)
        if spec.trainer.lr_by_staleness == "none":
            optimizer.step()
        else:
            scales.append(1 / max(1.0, float(tokens.staleness[tokens.step == step].double().mean())))
            optimizer.step(scales[-1])
    record = record.cpu()
    label, is_cap = provenance_label(proximal, scored), spec.knobs.is_cap
    is_truncated = record.clip_mask & (record.log_r_s > math.log(is_cap or math.inf))
    return UpdateResult(
        metrics={
            "loss/value": float(torch.stack(losses).mean()),
            "grad/norm": float(torch.stack(norms).mean()),
            "grad/norm_max": float(torch.stack(norms).max()),
            "policy/entropy": float(record.entropy.mean()),
            **_diagnostics(tokens, record, spec),
            **_band_shares(tokens, record, spec.band),
            **_reference_shares(tokens, record),
            "train/lr": first_lr,
            **({"train/lr_scale": sum(scales) / len(scales)} if scales else {}),
            **lag0_above,
            "score/taken_share": float(tokens.left_out.float().mean()),
            "train/reads_per_token": float(torch.stack(num_read).sum()) / len(tokens.flat),
            **take_counts(model, ranks).metrics("routing/theta"),
            "mask/num_truncated": int(is_truncated.sum()),
        },
        staleness_counts=dict(sorted(Counter(tokens.staleness.tolist()).items())),
        provenance=count_provenance(batch.mixed_kv[tokens.flat], proximal, label),
        lag0_max_abs_error=lag0,
        rescored_max_abs_error=rescored,
        table=token_table(batch, tokens, record, proximal=proximal, label=label, version=version),
    )


def _check_policies(tokens: LossTokens, spec: TrainerSpec) -> None:
    if spec.objective.has_reference and REFERENCE not in tokens.logp:
        raise MissingLogprobError(
            "the recipe has a reference, and it has not scored the batch",
            got="no log-probs of REFERENCE",
            allowed="one per loss token",
            fix="call score_reference after put_batch",
        )
    missing = [policy.name for policy in spec.knobs.variant.needs if policy not in tokens.logp]
    if missing:
        raise MissingLogprobError(
            f"variant '{spec.variant}' needs log-probs of {', '.join(missing)}",
            got="none for this batch",
            allowed="one per loss token",
            fix="pass the batch through its source first",
        )


def _accumulate(
    model: PreTrainedModel,
    batch: TokenBatch,
    tokens: LossTokens,
    step: int,
    record: TokenRecord,
    spec: TrainerSpec,
    ranks: Ranks,
) -> tuple[Tensor, Tensor]:
    """Accumulate the gradient of one optimizer step; return its loss and the tokens that were read (0-d, detached).

    Ranks average their gradients: each computes that of its own micro-batches times the number of ranks.
    """
    proximal, form_terms = spec.knobs.variant.proximal, LOSSES.find(spec.objective.loss)
    chosen = tokens.step == step
    weights, scale, step_mask = _step_weights(model, batch, tokens, chosen, spec, ranks)
    total, num_read = torch.zeros((), device=weights.device), torch.zeros((), dtype=torch.int64)
    record.clear(chosen)
    flat, budget = tokens.flat[chosen.cpu().numpy()], spec.sizes["micro_batch_tokens"]
    for one in rank_micro_batches(model, batch, flat, budget, ranks):
        micro = one.micro
        here = torch.from_numpy(np.searchsorted(tokens.flat, micro.flat.numpy())).to(weights.device)
        theta, entropy = _read(model, micro, spec)
        logp = {policy: values[here] for policy, values in tokens.logp.items()} | {THETA: theta}
        if proximal in INTERPOLATE:
            logp[proximal] = _interpolate(logp[MU], theta, tokens.staleness[here], spec)
        elif proximal is OLD:
            logp[OLD] = torch.where(tokens.old_is_theta[here], theta.detach(), logp[OLD])
        terms = form_terms(tokens.inputs(here, logp, step_mask), spec.knobs)
        values = _regularised(terms.values / scale, logp, entropy, spec)
        loss = weighted_loss(values, weights[here] * float(not one.is_padding))
        (loss * ranks.num_ranks).backward()  # type: ignore[no-untyped-call]
        if one.is_padding:
            continue
        total += loss.detach()
        num_read += micro.num_read
        record.put(here, logp, entropy.detach(), proximal, terms)
    record.share(chosen, ranks)
    return ranks.sum(total), ranks.sum(num_read)


def _read(model: PreTrainedModel, micro: MicroBatch, spec: TrainerSpec) -> tuple[Tensor, Tensor]:
    """Give THETA's log-probs of a micro-batch's tokens, and the entropies, which have gradients where there is a bonus."""
    chunk = spec.sizes["head_chunk_tokens"]
    if spec.objective.entropy_bonus:
        return action_logps_and_entropies(model, micro, head_chunk_tokens=chunk)
    entropy = torch.empty(len(micro.flat), device=model.device)
    return action_logps(model, micro, head_chunk_tokens=chunk, entropy=entropy), entropy


def _regularised(values: Tensor, logp: Mapping[Policy, Tensor], entropy: Tensor, spec: TrainerSpec) -> Tensor:
    """Add to the surrogates what the recipe adds to them."""
    o = spec.objective
    kl = kl_estimate(logp[THETA], logp[REFERENCE], o.kl_estimate) if o.has_reference and o.kl_in == "loss" else None
    bonus = entropy if o.entropy_bonus else None
    return regularised(values, kl=kl, kl_coefficient=o.kl_coefficient, entropy=bonus, entropy_bonus=o.entropy_bonus)


def _step_weights(
    model: PreTrainedModel, batch: TokenBatch, tokens: LossTokens, chosen: Tensor, spec: TrainerSpec, ranks: Ranks
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Give each token's share of the loss of its optimizer step, 0 for tokens of other steps, and what is of the whole step.

    "token-mean-kept" counts the tokens that r_d does not mask, whatever the loss makes of it.

    Returns:
        The shares; the mean weight that surrogates are divided by, 1 where weights are not normalised; and what the loss's step
        rule keeps, None where it has none.
    """
    knobs, kept, scale, step_mask = spec.knobs, chosen, torch.ones(()), None
    variant, rule, is_kept = (
        knobs.variant,
        card_of(spec.objective.loss).step_rule,
        spec.objective.loss_aggregation == "token-mean-kept",
    )
    if is_kept or knobs.correction.normalise or rule:
        logp = dict(tokens.logp)
        if variant.proximal in INTERPOLATE and not variant.r_d.is_one:
            theta = torch.zeros(len(tokens.flat), device=chosen.device)
            scores = score_tokens(model, batch, tokens.flat[chosen.cpu().numpy()], **spec.sizes, ranks=ranks)
            theta[chosen] = torch.from_numpy(scores).to(chosen.device)
            logp[variant.proximal] = _interpolate(logp[MU], theta, tokens.staleness, spec)
        whole_step = replace(tokens.inputs(torch.arange(len(chosen), device=chosen.device), logp), loss_mask=chosen)
        log_r_d = log_discrepancy(variant, logp)
        kept = chosen & correct(log_r_d, whole_step, knobs).kept if is_kept else chosen
        scale = mean_weight(log_r_d, whole_step, knobs) if knobs.correction.normalise else scale
        step_mask = STEP_RULES.find(rule)(whole_step, knobs) if rule else None
    weights = token_weights(
        chosen,
        mode=spec.objective.loss_aggregation,
        sequence_index=tokens.sequence,
        num_sequences=tokens.num_sequences,
        kept_mask=kept,
        constant=spec.objective.loss_aggregation_tokens,
    )
    return weights, scale.to(weights.device), step_mask


def _interpolate(logp_mu: Tensor, theta: Tensor, staleness: Tensor, spec: TrainerSpec) -> Tensor:
    """Interpolate the proximal policy, with the recipe's weight on MU or that of each token's staleness."""
    o = spec.objective
    weight_mu = a3po_weight_mu(staleness) if o.interpolation_schedule == "a3po" else o.interpolation_mu
    return INTERPOLATE[spec.knobs.variant.proximal](logp_mu, theta, weight_mu)


def _check_lag0(
    tokens: LossTokens, record: TokenRecord, mixed_kv: Tensor, noise: PackingNoise, *, may_tie: bool
) -> tuple[float, float, Mapping[str, float]]:
    """Check before the first optimizer step that OLD of fresh tokens of the current version is THETA, as the source scored it.

    Where experts `may_tie`, each of the two chooses its own. A THETA that is not finite contradicts nothing: the loss is not
    finite either, and that is refused.

    Returns:
        The largest difference in nats of OLD as the loss used it, and of what the source scored; NaN where there is no such
        token. And the metrics of such experts.
    """
    fresh = (tokens.step == 0) & (tokens.staleness == 0) & ~mixed_kv & torch.isfinite(record.theta)
    scored = fresh & ~tokens.left_out
    errors = (record.theta - tokens.logp[OLD])[scored].abs().numpy()
    check_rescored(errors, noise, num_excused(tokens.sequence[scored].numpy(), routed=may_tie))
    above = {"consistency/num_lag0_above": float(np.count_nonzero(errors > CONSISTENCY_TOLERANCE))} if may_tie else {}
    return judged_error((record.theta - record.proximal)[fresh].abs().numpy()), judged_error(errors), above


def _check_finite(loss: Tensor, norm: Tensor, version: int, step: int) -> None:
    if not bool(torch.isfinite(loss + norm)):
        raise NonFiniteError(
            f"the loss or its gradient is not finite at version {version}, optimizer step {step}",
            got=f"loss {float(loss)}, gradient norm {float(norm)}",
            allowed="finite numbers",
            fix="lower trainer.lr, tighten the band, or inspect the saved batch",
        )


def _diagnostics(tokens: LossTokens, record: TokenRecord, spec: TrainerSpec) -> dict[str, float]:
    return to_metrics(
        diagnose(
            record.log_r_d,
            record.log_r_s,
            band_mask=record.band_mask,
            clip_mask=record.clip_mask,
            loss_mask=torch.ones_like(record.band_mask),
            staleness=tokens.staleness,
            advantages=tokens.advantages,
            num_staleness=spec.max_staleness + 1,
        )
    )


def _reference_shares(tokens: LossTokens, record: TokenRecord) -> dict[str, float]:
    """Tell how far THETA is from the reference, on tokens with a finite estimate; nothing where there is no reference."""
    if REFERENCE not in tokens.logp:
        return {}
    log_ratio = (record.theta - tokens.logp[REFERENCE]).double()
    log_ratio = log_ratio[log_ratio.isfinite()]
    estimates = {name: kl_estimate(log_ratio, torch.zeros_like(log_ratio), name) for name in KL_METRICS}
    return {f"kl/theta_ref_{name}": float(found.mean()) for name, found in estimates.items()}


def _band_shares(tokens: LossTokens, record: TokenRecord, band: float) -> dict[str, float]:
    """Tell what the band keeps of the first step's tokens: with the proximal policy in r_d, and with the weights before it."""
    first = tokens.step == 0
    all_of_them, mu = first[first], tokens.logp[MU][first]

    def share(logp: Tensor) -> float:
        return float(kept_mask(logp[first] - mu, all_of_them, band).float().mean())

    return {"mask/rho_band_first": share(record.proximal), "mask/rho_band_live": share(record.theta)}
