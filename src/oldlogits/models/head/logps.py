"""Log-probs of given tokens from final hidden states, a few words of the vocabulary at a time.

    for some words:                      once over the weights, each rounded once
        for some tokens:                 in one buffer, in place
            logits = hidden weights^T -> / temperature -> largest, sum of exponentials, the token's own logit

The backward pass forms the logits again, turns them into their gradient where they are, and adds up the gradients of hidden
states and weights. So memory does not grow with tokens times vocabulary. The entropy of a token's distribution comes out of the
same passes, where it is asked for with its gradient too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from oldlogits.core.objective.shapes import Float, Int
from oldlogits.models.forward import wide_product
from oldlogits.models.head.logits import LogitForm

ON_CPU: Final = 2**20
"""Logits that are formed at once on a CPU: so few that they stay in its caches."""
ELSEWHERE: Final = 2**26
"""The same on an accelerator, where a product must be large to be fast."""
_LOG2_E: Final = math.log2(math.e)
_LN_2: Final = math.log(2)

LEAST_WORDS: Final = 128
"""Words that are formed at once, however many tokens go through the head together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadWork:
    """What is asked of the head beside tensors.

    Args:
        form: How the model forms logits.
        tokens_at_once: The most tokens of one product.
        entropy: float32 [token]; takes the entropy of each token's distribution, in nats; None: nobody asks for it.
        trains_entropy: Whether the entropies are returned beside the log-probs, with gradients.
    """

    form: LogitForm
    tokens_at_once: int
    entropy: Tensor | None = None
    trains_entropy: bool = False


def words_at_once(num_tokens: int, num_words: int, device_type: str) -> int:
    """Give the number of words of one product with so many tokens at once, of so many words in all."""
    most = ON_CPU if device_type == "cpu" else ELSEWHERE
    return min(num_words, max(LEAST_WORDS, most // max(1, num_tokens)))


def token_logps(
    rows: Float[Tensor, "token width"],
    weight: Float[Tensor, "word width"],
    bias: Float[Tensor, " word"] | None,
    targets: Int[Tensor, " token"],
    temperature: Float[Tensor, " token"],
    work: HeadWork,
) -> Float[Tensor, " token"]:
    """Give ``log_softmax(logits / temperature)[target]`` in nats, with gradients of hidden states, weights and biases.

    A number depends on values and shapes alone, and not on whether gradients are needed. Tokens whose incoming gradient is 0
    cost the backward pass nothing.
    """
    logps: Tensor = _TokenLogps.apply(rows, weight, bias, targets, temperature, work)  # type: ignore[no-untyped-call]
    return logps


def token_logps_and_entropies(
    rows: Float[Tensor, "token width"],
    weight: Float[Tensor, "word width"],
    bias: Float[Tensor, " word"] | None,
    targets: Int[Tensor, " token"],
    temperature: Float[Tensor, " token"],
    work: HeadWork,
) -> tuple[Float[Tensor, " token"], Float[Tensor, " token"]]:
    """Give what `token_logps` gives, and ``H = -sum p log p`` of each token's distribution in nats, both with gradients.

    With ``p = softmax(logits / temperature)`` the gradient of H is ``-p (log p + H)`` for each logit over the temperature.
    """
    work = replace(work, trains_entropy=True)
    found: tuple[Tensor, Tensor] = _TokenLogps.apply(  # type: ignore[no-untyped-call]
        rows, weight, bias, targets, temperature, work
    )
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """The logits of some tokens and some words, before they are formed.

    Args:
        tokens: The range of the tokens.
        words: The range of the words.
        weight: The words' weights as they are multiplied.
        bias: The words' biases, where there are some.
    """

    tokens: slice
    words: slice
    weight: Tensor
    bias: Tensor | None


class _Pieces:
    """The logits of some tokens and all words in pieces, which are formed one after the other in the same memory.

    They are binary: times log2(e), so that probabilities are powers of 2, which cost half of what powers of e do. Where nothing
    else happens to the product, hidden states are scaled by this, by the inverse temperature and by the family's factors.
    """

    def __init__(
        self, rows: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: Tensor, work: HeadWork
    ) -> None:
        form, self._weight, self._bias, self._targets = work.form, weight, bias, targets
        scale = (_LOG2_E / temperature.to(form.logit_type))[:, None]
        self._form, self._scale, self._temperature = form, scale, temperature[:, None]
        self.is_scaled = form.is_plain and bias is None
        """Whether it is the hidden states that are scaled."""
        self.row_scale = scale * (form.factor / form.divisor)
        self.rows = rows.to(form.factors)
        self.rows = self.rows * self.row_scale if self.is_scaled else self.rows
        self._tokens = max(1, min(len(rows), work.tokens_at_once))
        self._words = words_at_once(self._tokens, len(weight), rows.device.type)
        self.buffer = rows.new_empty(self._tokens * self._words, dtype=form.logit_type)
        self.is_one = self._tokens >= len(rows) and self._words == len(weight)
        """Whether there is one piece."""

    def __iter__(self) -> Iterator[_Piece]:
        for start in range(0, len(self._weight), self._words):
            words = slice(start, min(start + self._words, len(self._weight)))
            weight = self._form.rounded(self._weight[words])
            bias = None if self._bias is None else self._form.rounded(self._bias[words])
            for first in range(0, len(self.rows), self._tokens):
                tokens = slice(first, min(first + self._tokens, len(self.rows)))
                yield _Piece(tokens=tokens, words=words, weight=weight, bias=bias)

    def at(self, piece: _Piece, buffer: Tensor) -> Tensor:
        """View the beginning of a buffer as numbers of a piece."""
        shape = piece.tokens.stop - piece.tokens.start, piece.words.stop - piece.words.start
        return buffer[: shape[0] * shape[1]].view(shape)

    def logits(self, piece: _Piece) -> tuple[Tensor, Tensor | None]:
        """Form the binary logits of a piece in the buffer, and the slope of the family's bound; None: there is no bound."""
        out, rows = self.at(piece, self.buffer), self.rows[piece.tokens]
        if self.is_scaled:
            return torch.mm(rows, piece.weight.t(), out=out), None
        logits = self._form.logits(rows, piece.weight, piece.bias, out)
        slope = self._form.slope(logits)
        return logits.mul_(self._scale[piece.tokens]), slope

    def own(self, piece: _Piece) -> tuple[Tensor, Tensor]:
        """Tell where the tokens' own words are in a piece: [token, 1], and [token], whether they are in it at all."""
        place = self._targets[piece.tokens] - piece.words.start
        num = piece.words.stop - piece.words.start
        return place.clamp(0, num - 1).unsqueeze(1), (place >= 0) & (place < num)


class _TokenLogps(torch.autograd.Function):
    """See `token_logps`."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: Tensor,
        work: HeadWork,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Add up the powers of each token's logits, relative to the largest so far."""
        pieces = _Pieces(rows, weight, bias, targets, temperature, work)
        asked = work.entropy is not None or work.trains_entropy
        top = rows.new_full((len(rows),), -torch.inf, dtype=work.form.logit_type)
        total, chosen, weighted = torch.zeros_like(top), torch.zeros_like(top), torch.zeros_like(top)
        spare = torch.empty_like(pieces.buffer) if asked else pieces.buffer
        powers, slope = pieces.buffer, None
        for piece in pieces:
            here, (logits, slope) = piece.tokens, pieces.logits(piece)
            place, is_own = pieces.own(piece)
            chosen[here] = torch.where(is_own, logits.gather(1, place).squeeze(1), chosen[here])
            largest = torch.maximum(top[here], logits.amax(1))
            fallen = torch.where(total[here] > 0, top[here] - largest, 0)  # at most 0; -inf before the first words
            logits.sub_(largest[:, None])
            powers = torch.exp2(logits, out=pieces.at(piece, spare))
            if asked:
                weighted[here] = fallen.exp2() * (weighted[here] + fallen * total[here]) + logits.mul_(powers).sum(1)
            total[here] = fallen.exp2() * total[here] + powers.sum(1)
            top[here] = largest
        entropy = total.log() - weighted / total * _LN_2 if asked else None
        if work.entropy is not None and entropy is not None:
            work.entropy.copy_(entropy)
        ctx.work = work  # type: ignore[attr-defined]
        keeps = pieces.is_one and slope is None and not work.trains_entropy
        kept = powers if keeps and any(ctx.needs_input_grad) else None  # type: ignore[attr-defined]
        spread = entropy if work.trains_entropy else None
        ctx.save_for_backward(rows, weight, bias, targets, temperature, top, total, kept, spread)  # type: ignore[arg-type]
        logps = chosen.sub_(top).mul_(_LN_2).sub_(total.log())
        return logps if spread is None else (logps, spread)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Form the logits again, make them their gradient, and multiply."""
        work, saved = ctx.work, list(ctx.saved_tensors)  # type: ignore[attr-defined]
        rows, weight, bias, entropy, kept = saved[0], saved[1], saved[2], saved.pop(), saved.pop()
        form, wanted = work.form, ctx.needs_input_grad  # type: ignore[attr-defined]
        needed = _needed(*gradients)
        incoming = gradients[0].index_select(0, needed) * _LN_2
        saved[3:] = (one.index_select(0, needed) for one in saved[3:])
        saved[0], kept = rows.index_select(0, needed), None if kept is None else kept.index_select(0, needed)
        top, total = saved[5:]
        pieces = _Pieces(saved[0], weight, bias, saved[3], saved[4], work)
        scale = incoming if pieces.is_scaled else incoming * pieces.row_scale.squeeze(1)
        shares, spread = (-scale / total)[:, None], None
        if entropy is not None:
            slopes = gradients[1].index_select(0, needed) * _LN_2
            slopes = slopes if pieces.is_scaled else slopes * pieces.row_scale.squeeze(1)
            spread = _Spread(slopes=slopes, entropy=entropy.index_select(0, needed), total=total, like=pieces.buffer)
        d_rows = top.new_zeros(saved[0].shape) if wanted[0] else None
        d_weight = top.new_zeros(weight.shape) if wanted[1] else None
        d_bias = top.new_zeros(bias.shape) if wanted[2] else None
        for piece in pieces:
            here, slope = piece.tokens, None
            if kept is None:
                logits, slope = pieces.logits(piece)
                logits.sub_(top[here, None])
                logits = logits.exp2_().mul_(shares[here]) if spread is None else spread.gradient(logits, shares[here], here)
            else:
                logits = kept.clone().mul_(shares[here])
            place, is_own = pieces.own(piece)
            logits.scatter_add_(1, place, torch.where(is_own, scale[here], 0).unsqueeze(1))
            gradient = (logits if slope is None else logits.mul_(slope)).to(form.gradients).to(form.factors)
            if d_rows is not None:
                _add_product(d_rows[here], gradient, piece.weight)
            if d_weight is not None:
                _add_product(d_weight[piece.words], gradient.t(), pieces.rows[here])
            if d_bias is not None:
                d_bias[piece.words].add_(gradient.sum(0))
        if d_rows is not None:
            d_rows = d_rows.mul_(pieces.row_scale) if pieces.is_scaled else d_rows
            d_rows = torch.zeros_like(rows).index_copy_(0, needed, d_rows.to(rows.dtype))
        return d_rows, d_weight, d_bias, None, None, None


class _Spread:
    """The part of the entropies in the gradient of binary logits."""

    def __init__(self, *, slopes: Tensor, entropy: Tensor, total: Tensor, like: Tensor) -> None:
        """Take the gradient that comes in, the entropies and the sums of powers: [token] each; and memory of this form."""
        self._factor, self._above = (-slopes / total)[:, None], (entropy - total.log())[:, None]
        self._buffer = torch.empty_like(like)

    def gradient(self, logits: Tensor, shares: Tensor, here: slice) -> Tensor:
        """Make binary logits x below the largest their gradient, in place: ``2^x (shares - slope (log p + H) / total)``."""
        powers = torch.exp2(logits, out=self._buffer[: logits.numel()].view_as(logits))
        return logits.mul_(_LN_2).add_(self._above[here]).mul_(self._factor[here]).add_(shares).mul_(powers)


def _needed(gradient: Tensor, *others: Tensor) -> Tensor:
    """Give the places of what is not 0 in all of them: int64 [token]; without numbers, on the meta device, all places."""
    for other in others:
        gradient = gradient.abs() + other.abs()
    return torch.arange(len(gradient), device="meta") if gradient.is_meta else gradient.nonzero().squeeze(1)


def _add_product(to: Tensor, left: Tensor, right: Tensor) -> None:
    """Add a product of matrices, its sums in the type of what it is added to."""
    if left.dtype == to.dtype:
        to.addmm_(left, right)
    else:
        to.add_(wide_product(left, right))
