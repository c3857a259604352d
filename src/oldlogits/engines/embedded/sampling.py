"""Draws one token for each row of logits, with the log-prob under the distribution that it was drawn from."""

from __future__ import annotations

import torch
from jaxtyping import Float32, Float64, Int64
from torch import Tensor


def draw_tokens(
    logits: Float32[Tensor, "row vocab"], temperature: Float32[Tensor, " row"], uniform: Float64[Tensor, " row"]
) -> tuple[Int64[Tensor, " row"], Float32[Tensor, " row"]]:
    """``token ~ softmax(logits / T)`` by inverting its cumulative sum, and the log of its probability; greedy where T is 0.

    The token is the first whose cumulative probability (float64) exceeds ``uniform * total``, so a token of
    probability 0 is never drawn.

    Args:
        logits: -inf takes a token out of the support.
        temperature: >= 0. Where it is 0 the likeliest token is taken, its log-prob is at T = 1.
        uniform: Numbers in [0, 1).

    Example:
        Logits log(0.2), log(0.8) at T = 1: uniform 0.19 draws token 0, 0.21 draws token 1.
    """
    greedy = temperature == 0
    logp = torch.log_softmax(logits / temperature.masked_fill(greedy, 1.0)[:, None], dim=-1)
    cumulative = torch.cumsum(logp.exp(), dim=-1, dtype=torch.float64)
    target = uniform[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, target, right=True).squeeze(1).clamp_(max=logits.shape[1] - 1)
    if bool(greedy.any()):
        tokens = torch.where(greedy, logp.argmax(dim=-1), tokens)
    return tokens, logp.gather(1, tokens[:, None]).squeeze(1)


def restrict_support(
    logits: Float32[Tensor, "row vocab"],
    temperature: Float32[Tensor, " row"],
    top_p: Float32[Tensor, " row"],
    top_k: Int64[Tensor, " row"],
) -> Float32[Tensor, "row vocab"]:
    """Logits with -inf outside the k likeliest tokens and outside the nucleus of mass p among them.

    The nucleus is the shortest run of the likeliest tokens whose probability at `temperature` reaches p. Rows of
    temperature 0 are left as they are.
    """
    ordered, order = torch.sort(logits, dim=-1, descending=True, stable=True)
    ranks = torch.arange(logits.shape[1])
    dropped = (top_k[:, None] > 0) & (ranks >= top_k[:, None])
    scaled = ordered.masked_fill(dropped, -torch.inf) / temperature.masked_fill(temperature == 0, 1.0)[:, None]
    probability = torch.softmax(scaled, dim=-1)
    mass_before = torch.cumsum(probability, dim=-1, dtype=torch.float64) - probability
    dropped |= (mass_before >= top_p[:, None]) & (top_p[:, None] < 1)
    dropped &= temperature[:, None] > 0
    return logits.masked_fill(torch.zeros_like(dropped).scatter_(1, order, dropped), -torch.inf)
