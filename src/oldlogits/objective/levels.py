"""Ratios of tokens, of sequences, and of prefixes, from the log-ratios of tokens; no loop over either."""

from __future__ import annotations

import torch
from torch import Tensor

from oldlogits.core.objective.correction import Level
from oldlogits.core.objective.shapes import Bool, Float, Int


@torch.no_grad()
def at_level(
    log_ratio: Float[Tensor, " token"],
    level: Level,
    *,
    counted: Bool[Tensor, " token"],
    sequence_index: Int[Tensor, " token"],
    num_sequences: int,
) -> Float[Tensor, " token"]:
    """Give every token the log of its ratio at a level, detached, from the log-ratios of the counted tokens of its sequence.

    With ``l_t`` the log-ratio of token t and N the counted tokens of its sequence: "token" ``l_t``, "sequence" ``sum l``,
    "geometric" ``sum l / N``, "prefix" ``sum_{i <= t} l_i`` in the order of the tokens. Others add nothing.

    Example:
        Log-ratios [.1, .3, -.2] of the sequences [0, 0, 1]: sequence [.4, .4, -.2], geometric [.2, .2, -.2],
        prefix [.1, .4, -.2].
    """
    values = torch.where(counted, log_ratio, 0.0)
    if level == "token":
        return values
    if level == "prefix":
        order = sequence_index.argsort(stable=True)
        ordered, index = values[order].double(), sequence_index[order]
        running = ordered.cumsum(0)
        before = sums_by_sequence(ordered, index, num_sequences).cumsum(0)
        before = torch.cat([before.new_zeros(1), before])[index]
        return torch.empty_like(values).index_put((order,), (running - before).to(values.dtype))
    sums = sums_by_sequence(values, sequence_index, num_sequences)
    if level == "geometric":
        sums = sums / sums_by_sequence(counted.to(values.dtype), sequence_index, num_sequences).clamp(min=1)
    return sums[sequence_index]


def sums_by_sequence(
    values: Float[Tensor, " token"], sequence_index: Int[Tensor, " token"], num_sequences: int
) -> Float[Tensor, " sequence"]:
    """Sum over the tokens of each sequence; 0 for one without tokens here."""
    return values.new_zeros(num_sequences).index_add(0, sequence_index, values)


def binary_kl(log_p: Float[Tensor, " token"], log_q: Float[Tensor, " token"]) -> Float[Tensor, " token"]:
    """Give ``KL(p || q)`` over two outcomes, the sampled token or any other one.

    ``p log(p / q) + (1 - p) log((1 - p) / (1 - q))``, in float64: ``1 - p`` loses its digits near 1. Probabilities are taken
    within [1e-8, 1 - 1e-8].

    Example:
        p = .5, q = .25: ``.5 log 2 + .5 log(.5 / .75) = .1438``.
    """
    p, q = (logp.double().exp().clamp(1e-8, 1 - 1e-8) for logp in (log_p, log_q))
    found = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    return found.to(log_p.dtype)
