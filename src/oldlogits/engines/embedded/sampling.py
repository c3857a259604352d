"""From final hidden states to tokens: one is drawn for each row, with its log-prob under the distribution that it came from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from oldlogits.core.objective.shapes import Float32, Float64, Int64
from oldlogits.engines.embedded.decoder import Decoder

BLOCK: Final = 128
"""Tokens whose probabilities are added up before one of them is looked for; most vocabularies are a multiple of it."""

_PIECE: Final = 1 << 18
"""The most logits that a CPU takes at once: what it computes from them stays in its caches."""

_KEPT: Final = 1 << 24
"""The most logits of the piece of memory that a CPU keeps for them."""

_SMALL: Final = 1024
"""The largest vocabulary whose probabilities are added up in float32."""

_FIRST_LOOK: Final = 1024
"""The likeliest tokens among which a nucleus is looked for first."""


class Head:
    """What an engine makes of final hidden states: the tokens that it draws, and the log-probs of tokens that it is given.

    A CPU takes so many rows at a time as fit into a bounded piece of memory, which is kept: logits of a large vocabulary in
    fresh memory cost a page fault for each thousand of them.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder, self._memory = decoder, torch.empty(0)
        self._most = max(1, _KEPT // decoder.config.vocab_size)

    def draw(
        self, hidden: Tensor, uniform: Tensor, temperature: Tensor, support: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Draw a token for each row, and its log-prob; of `support`, top_p and top_k of each row, if any restricts it."""
        drawn = []
        for rows, logits in self._pieces(hidden):
            if support is not None:
                restrict_support(logits, temperature[rows], *(limits[rows] for limits in support))
            drawn.append(draw_tokens(logits, temperature[rows], uniform[rows]))
        tokens, logprobs = zip(*drawn, strict=True)
        return torch.cat(tokens), torch.cat(logprobs)

    def logprobs(self, hidden: Tensor, token_ids: Tensor) -> Tensor:
        """The log-prob at temperature 1 of a token after each row."""
        found = [
            torch.log_softmax(logits, dim=-1).gather(1, token_ids[rows, None]).squeeze(1)
            for rows, logits in self._pieces(hidden)
        ]
        return torch.cat(found)

    def _pieces(self, hidden: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """The logits of some rows after the other, which the next overwrite on a CPU."""
        if hidden.device.type != "cpu":
            yield slice(len(hidden)), self._decoder.logits(hidden)
            return
        vocab = self._decoder.config.vocab_size
        num = min(len(hidden), self._most)
        if len(self._memory) < num * vocab:
            self._memory = torch.empty(num * vocab)
        for start in range(0, len(hidden), num):
            part = hidden[start : start + num]
            out = self._memory[: len(part) * vocab].view(-1, vocab)
            yield slice(start, start + num), self._decoder.logits(part, out=out)


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
    rows = max(1, _PIECE // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    if len(logits) <= rows:
        return _draw(logits, temperature, uniform)
    pieces = zip(*(torch.split(values, rows) for values in (logits, temperature, uniform)), strict=True)
    tokens, logprobs = zip(*(_draw(*piece) for piece in pieces), strict=True)
    return torch.cat(tokens), torch.cat(logprobs)


def _draw(logits: Tensor, temperature: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    greedy = temperature == 0
    scaled = logits / temperature.masked_fill(greedy, 1.0)[:, None]
    if is_small := scaled.shape[1] <= _SMALL:
        scaled = torch.log_softmax(scaled, dim=-1)
        tokens, _ = invert(scaled.exp(), uniform)
    else:  # a sum of so many in float32 would be 1e-5 wrong
        scaled -= scaled.amax(dim=-1, keepdim=True)
        tokens, total = invert(scaled.exp(), uniform)
    if logits.device.type != "cpu" or bool(greedy.any()):  # on a GPU, to look would be to wait
        tokens = torch.where(greedy, scaled.argmax(dim=-1), tokens)
    logprobs = scaled.gather(1, tokens[:, None]).squeeze(1)
    return tokens, logprobs if is_small else logprobs.sub_(total.log().float())


def invert(
    weights: Float32[Tensor, "row num"], uniform: Float64[Tensor, " row"]
) -> tuple[Int64[Tensor, " row"], Float64[Tensor, " row"]]:
    """The first index at which the cumulative sum of a row, in float64, exceeds ``uniform * total``, and the total.

    The weight there is not 0. Blocks are added up first, then the weights of one block of each row.

    Example:
        Weights 0, 1, 0, 3: uniform 0.2 gives index 1, 0.25 gives index 3.
    """
    num = weights.shape[1]
    blocks = (F.pad(weights, (0, -num % BLOCK)) if num % BLOCK else weights).view(len(weights), -1, BLOCK)
    starts = F.pad(blocks.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1), (1, 0))  # of blocks, and the total
    target = uniform[:, None] * starts[:, -1:]
    block = (torch.searchsorted(starts, target, right=True) - 1).clamp_(0, blocks.shape[1] - 1)
    inside = blocks.gather(1, block[..., None].expand(-1, 1, BLOCK)).squeeze(1).cumsum(dim=-1, dtype=torch.float64)
    below_end = torch.nextafter(inside[:, -1:], torch.zeros_like(target))  # sums in another order end a last bit apart
    left = torch.minimum(target - starts.gather(1, block), below_end)
    at = torch.searchsorted(inside, left, right=True).clamp_(max=BLOCK - 1)
    return (block * BLOCK + at).squeeze(1).clamp_(max=num - 1), starts[:, -1]


def restrict_support(
    logits: Float32[Tensor, "row vocab"],
    temperature: Float32[Tensor, " row"],
    top_p: Float32[Tensor, " row"],
    top_k: Int64[Tensor, " row"],
) -> Float32[Tensor, "row vocab"]:
    """The logits, in their own memory, with -inf outside the k likeliest tokens and outside the nucleus of mass p among them.

    The nucleus is the shortest run of the likeliest tokens whose probability at `temperature` reaches p; of equally likely
    ones the first. Rows of temperature 0 are left as they are.
    """
    rows = max(1, _PIECE // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    for piece in zip(*(torch.split(values, rows) for values in (logits, temperature, top_p, top_k)), strict=True):
        _restrict(*piece)
    return logits


def _restrict(logits: Tensor, temperature: Tensor, top_p: Tensor, top_k: Tensor) -> None:
    on_cpu, vocab = logits.device.type == "cpu", logits.shape[1]
    restricted = ((temperature > 0) & ((top_p < 1) | (top_k > 0)))[:, None]
    if on_cpu and not bool(restricted.any()):  # on a GPU, to look would be to wait
        return
    temperature, top_p, top_k = temperature.masked_fill(temperature == 0, 1.0)[:, None], top_p[:, None], top_k[:, None]
    total = (logits / temperature).logsumexp(dim=-1, keepdim=True)
    size = max(_FIRST_LOOK, int(top_k.max())) if on_cpu else vocab
    while True:
        likeliest = logits.topk(size).values if 4 * size < vocab else logits.sort(dim=-1, descending=True).values
        dropped = (top_k > 0) & (torch.arange(likeliest.shape[1], device=logits.device) >= top_k)
        scaled = (likeliest / temperature).masked_fill_(dropped, -torch.inf)
        probability = (scaled - torch.where(top_k > 0, scaled.logsumexp(dim=-1, keepdim=True), total)).exp_()
        mass_before = torch.cumsum(probability, dim=-1, dtype=torch.float64) - probability
        dropped |= (mass_before >= top_p) & (top_p < 1)
        num = (~dropped).sum(dim=-1, keepdim=True)
        if 4 * size >= vocab or bool((dropped[:, -1:] | (top_k > 0) | ~restricted).all()):
            break
        size = vocab
    least = likeliest.gather(1, num - 1)
    kept = ~(logits < least)
    if not on_cpu or bool((kept.sum(dim=-1, keepdim=True) > num).any()):  # of those as likely as the least, the first
        ties = logits == least
        kept &= ~ties | (ties.cumsum(dim=-1) <= num - (logits > least).sum(dim=-1, keepdim=True))
    logits.masked_fill_(~kept & restricted, -torch.inf)
