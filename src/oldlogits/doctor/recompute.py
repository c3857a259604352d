"""OLD, computed from the weights of the version that sampled each token; what it splits, and what it would have decided."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from oldlogits.batch.sequences import pack
from oldlogits.batch.token_table import TokenTable
from oldlogits.core.errors import TokenTableError
from oldlogits.core.scoring import ScoringSpan
from oldlogits.doctor.statistics import is_more
from oldlogits.doctor.tokens import UNKNOWN, Batch, Settings, Tokens
from oldlogits.doctor.verdicts import AtLag, Verdict, cannot_tell
from oldlogits.doctor.weights import WeightsOfVersions
from oldlogits.models.scorer import score_tokens
from oldlogits.objective.decision import decision_sums
from oldlogits.objective.masks import band_mask, clip_log_ratio

Floats = NDArray[np.float32]

_AT_ONCE: Final = 1 << 16
"""Tokens of trajectories that are scored in one call."""
_SIZES: Final = {"micro_batch_tokens": 4096, "head_chunk_tokens": 1024}
_RARE: Final = 1e-3
"""Share of decisions that rounding changes where OLD was right."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recomputed:
    """A batch with its exact OLD.

    Args:
        exact: The batch with OLD computed; missing where it could not be.
        left_out: Loss tokens without OLD, and why.
        lags: What it splits, by lag.
        verdict: Whether the trainer's own decisions stand.
    """

    exact: Batch
    left_out: tuple[tuple[str, int], ...]
    lags: tuple[AtLag, ...]
    verdict: Verdict


def recompute(batch: Batch, weights: WeightsOfVersions, settings: Settings, *, temperature: float = 1.0) -> Recomputed:
    """Score every loss token at its own version.

    Args:
        batch: A batch with token ids, whole contexts and versions.
        weights: The weights.
        settings: The bounds that decisions are compared under.
        temperature: The temperature that tokens were sampled at, where the batch does not say.
    """
    table = batch.table
    old = np.full(table.num_tokens, np.nan, np.float32)
    whole = _whole_contexts(table)
    usable = table.mask & whole[table.trajectory] & (table.index > 0) & ("token_id" not in batch.lacks)
    for version in np.unique(table.version[usable]):
        if version in weights.versions:
            rows = np.flatnonzero(usable & (table.version == version))
            with weights.at(int(version)) as model, torch.no_grad():
                _check_vocabulary(batch, rows, model.get_input_embeddings().weight.shape[0])
                for spans, part in _spans(table, rows, temperature):
                    old[part] = score_tokens(model, *pack(spans), **_SIZES)  # type: ignore[arg-type]
    known = np.isin(table.version, weights.versions)
    left_out = {
        "without their whole context": int((table.mask & ~usable).sum()),
        "of versions whose weights are not there": int((usable & ~known).sum()),
    }
    missing = MappingProxyType({**table.missing, "logp_old": np.isnan(old)})
    exact = replace(batch, table=replace(table, logp_old=old, missing=missing))
    lags, verdict = _compare(Tokens.of(batch, settings), Tokens.of(exact, settings))
    said = tuple((why, num) for why, num in left_out.items() if num)
    return Recomputed(exact=exact, left_out=said, lags=lags, verdict=verdict)


def _check_vocabulary(batch: Batch, rows: NDArray[np.int64], size: int) -> None:
    """Refuse tokens that a model does not have.

    Raises:
        TokenTableError: A trajectory of these rows holds one.
    """
    held = np.isin(batch.table.trajectory, batch.table.trajectory[rows])
    beyond = held & (batch.table.token_id >= size)
    if beyond.any():
        row = int(np.argmax(beyond))
        raise TokenTableError(
            f"{batch.source} holds tokens that the model of --weights does not have",
            got=f"token {batch.table.token_id[row]} at {batch.table.name_of(row)}",
            allowed=f"0 to {size - 1}",
            fix="name the weights of the model that sampled them",
        )


def _whole_contexts(table: TokenTable) -> NDArray[np.bool_]:
    """Bool [trajectory]; every position from 0 on is there."""
    counts = np.diff(table.starts)
    last = np.full(len(counts), -1)
    np.maximum.at(last, table.trajectory, table.index)
    whole: NDArray[np.bool_] = last == counts - 1
    return whole


def _spans(
    table: TokenTable, rows: NDArray[np.int64], temperature: float
) -> Iterator[tuple[list[ScoringSpan], NDArray[np.int64]]]:
    """Spans of some trajectories at a time, and the rows that they score."""
    starts, cuts = table.starts, np.flatnonzero(np.diff(table.trajectory[rows], prepend=-1) != 0)
    spans: list[ScoringSpan] = []
    parts: list[NDArray[np.int64]] = []
    for part in np.split(rows, cuts[1:]):
        start = int(starts[table.trajectory[part[0]]])
        heat = np.full(len(part), temperature, np.float32)
        if table.temperature is not None:
            heat = np.where(np.isnan(table.temperature[part]), heat, table.temperature[part])
        spans.append(
            ScoringSpan(
                trajectory_id=table.trajectories[table.trajectory[part[0]]],
                token_ids=table.token_id[start : int(part[-1]) + 1].astype(np.int64),
                positions=part - start,
                temperature=heat.astype(np.float32),
            )
        )
        parts.append(part)
        if sum(len(span.token_ids) for span in spans) >= _AT_ONCE:
            yield spans, np.concatenate(parts)
            spans, parts = [], []
    if spans:
        yield spans, np.concatenate(parts)


def _compare(given: Tokens, exact: Tokens) -> tuple[tuple[AtLag, ...], Verdict]:
    """What OLD splits by lag, and which of the trainer's decisions it changes."""
    use = np.isfinite(exact.old) & np.isfinite(exact.mu) & (exact.lag != UNKNOWN) & (exact.lag >= 0)
    if not use.any():
        return (), cannot_tell("no loss token has an OLD that could be computed, a log-prob of mu and a lag")
    old, mu, theta, lag = exact.old[use], exact.mu[use], exact.theta[use], exact.lag[use]
    known, place = np.unique(lag, return_inverse=True)  # a version of another numbering makes a lag of any size
    stand_in = given.old[use] if given.has("logp_old") else mu
    advantage = np.nan_to_num(exact.advantage[use])
    active, right = (_active(x, mu, theta, advantage, exact.settings) for x in (stand_in, old))
    sums = decision_sums(
        *(torch.from_numpy(column) for column in (stand_in, old, theta - mu, advantage)),
        active_mask=active,
        exact_active_mask=right,
        loss_mask=torch.ones(len(old), dtype=torch.bool),
        staleness=torch.from_numpy(place.astype(np.int64)),
        num_staleness=len(known),
    )
    changed = (sums.wrongly_kept + sums.wrongly_masked).tolist()
    moved = (sums.weight_wrongly_kept + sums.weight_wrongly_masked).tolist()
    lags = tuple(
        AtLag(
            source=exact.batch.source,
            lag=int(one),
            num_tokens=int((lag == one).sum()),
            log_r_d=float(np.abs(old - mu)[lag == one].mean()),
            log_r_s=float(np.abs(theta - old)[lag == one].mean()),
            changed=int(changed[at]),
            changed_weight=float(moved[at] / max(float(sums.weight[at]), 1e-30)),
        )
        for at, one in enumerate(known)
    )
    total, weight = sum(changed), sum(moved) / max(float(sums.weight.sum()), 1e-30)
    error = float(np.nanmean(np.abs(stand_in - old)))
    says = (
        f"with OLD at each token's own version {total:,} of {len(old):,} decisions of clip and band change, {weight:.1%} of "
        f"the weight |R A|; what the trainer took for OLD is off by {error:.2g} nats on average ({exact.settings.assumed})"
    )
    where = np.zeros(len(exact), np.bool_)
    where[np.flatnonzero(use)[(active != right).numpy()]] = True
    verdict = Verdict(
        outcome="finding" if is_more(total, len(old), _RARE) else "healthy",
        says=says,
        num_tokens=total,
        num_read=len(exact),
        where=exact.names(where),
        figures={"changed": float(total), "weight": weight, "error": error},
    )
    return lags, verdict


def _active(proximal: Floats, mu: Floats, theta: Floats, advantage: Floats, settings: Settings) -> torch.Tensor:
    """What clip and band keep with a proximal policy; THETA that is missing is clipped nowhere."""
    log_r_s = torch.from_numpy(np.nan_to_num(theta - proximal))
    clipped = clip_log_ratio(log_r_s, torch.from_numpy(advantage), settings.eps_low, settings.eps_high, settings.dual_clip)
    return (clipped == log_r_s) & band_mask(torch.from_numpy(proximal - mu), settings.band)
