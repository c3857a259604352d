"""From final hidden states to logits, as the model's own forward pass does it, for any chosen tokens and words."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from oldlogits.core.errors import ModelFolderError
from oldlogits.core.objective.shapes import Float
from oldlogits.models.forward import rounding_of, wide_product

_MOVED: Final = 1e-3
"""Logits that differ by more are of other arithmetic, and not of another order of the same sums."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitForm:
    """How a model forms its logits: the arithmetic of the product, and what some families do to them behind the head.

    Args:
        weights: The type that the weights are rounded to at their use.
        factors: The type of hidden states and weights in a product.
        sums: The type that the sums of products are rounded to; logits are float32 afterwards in any case.
        gradients: The type that the gradient of the logits is rounded to, as that of every other product is.
        divisor: Granite divides by its ``logits_scaling``.
        factor: Cohere multiplies by its ``logit_scale``.
        cap: Gemma bounds them by its ``final_logit_softcapping``: ``c tanh(logits / c)``; 0: there is no bound.
    """

    weights: torch.dtype
    factors: torch.dtype
    sums: torch.dtype
    gradients: torch.dtype
    divisor: float = 1.0
    factor: float = 1.0
    cap: float = 0.0

    @classmethod
    def of(cls, model: PreTrainedModel) -> Self:
        """Find out how a model forms them at present: whoever holds its arithmetic may change that, and so does autocast."""
        head, config = model.get_output_embeddings(), model.config.get_text_config()
        dtype, arithmetic = rounding_of(head)
        factors, sums = (arithmetic.compute, arithmetic.head) if arithmetic else (head.weight.dtype, head.weight.dtype)
        device = head.weight.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            factors = sums = torch.get_autocast_dtype(device)
        exact = device == "cpu" and factors != sums  # a CPU sums products of bf16 numbers without rounding as float32 ones
        return cls(
            weights=dtype or head.weight.dtype,
            factors=sums if exact else factors,
            sums=sums,
            gradients=factors,
            divisor=getattr(config, "logits_scaling", None) or 1.0,
            factor=getattr(config, "logit_scale", None) or 1.0,
            cap=getattr(config, "final_logit_softcapping", None) or 0.0,
        )

    @property
    def logit_type(self) -> torch.dtype:
        """The type of the logits and of all that is summed up of them: float32, in tests float64."""
        return torch.promote_types(self.factors, torch.float32)

    @property
    def is_plain(self) -> bool:
        """Whether logits are a product in their own type, times a factor."""
        return self.factors == self.logit_type and not self.cap

    def rounded(self, weight: Tensor) -> Tensor:
        """Give weights as a product reads them; those that need no rounding are no copy."""
        return weight.to(self.weights).to(self.factors)

    def logits(
        self, rows: Float[Tensor, "row width"], weight: Float[Tensor, "word width"], bias: Tensor | None, out: Tensor
    ) -> Float[Tensor, "row word"]:
        """Form the logits of some words, of hidden states and of weights as `rounded` gives them.

        Args:
            rows: Normed final hidden states, in the type of the factors.
            weight: The head's weights of these words.
            bias: Their biases.
            out: Memory that the logits may be written to: [row, word], in their type.
        """
        if self.factors == self.sums:
            plain = out if self.sums == out.dtype else None
            raw = torch.mm(rows, weight.t(), out=plain) if bias is None else torch.addmm(bias, rows, weight.t(), out=plain)
            logits = raw if plain is not None else out.copy_(raw)
        else:
            logits = wide_product(rows, weight.t())
            logits = logits if bias is None else logits.add_(bias)
        if self.divisor != 1:
            logits.div_(self.divisor)
        if self.factor != 1:
            logits.mul_(self.factor)
        return logits.div_(self.cap).tanh_().mul_(self.cap) if self.cap else logits

    def slope(self, logits: Tensor) -> Tensor | None:
        """Give the derivative of the bound at bounded logits; None: there is no bound."""
        return (logits / self.cap).square_().neg_().add_(1) if self.cap else None


def logits_of(model: PreTrainedModel, hidden: Float[Tensor, "row width"]) -> Float[Tensor, "row vocab"]:
    """Form all logits of normed final hidden states, without a gradient."""
    form, head = LogitForm.of(model), model.get_output_embeddings()
    with torch.no_grad():
        bias = None if head.bias is None else form.rounded(head.bias)
        out = hidden.new_empty(len(hidden), len(head.weight), dtype=form.logit_type)
        return form.logits(hidden.to(form.factors), form.rounded(head.weight), bias, out)


def check_head(model: PreTrainedModel, folder: Path) -> None:
    """Compare `logits_of` with the model's own forward pass, on a few tokens, and with others behind them.

    Raises:
        ModelFolderError: They differ: the family does something else behind its decoder, or a token reads what stands behind
            it, such as padding.
    """
    ids = torch.arange(min(4, model.config.get_text_config().vocab_size))[None]
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits[0].float()
        found = logits_of(model, model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0])
    if not torch.allclose(found, expected, rtol=1e-4, atol=1e-4, equal_nan=True):
        raise ModelFolderError(
            "the trainer cannot train this model: between its decoder and its logits is more than a linear head",
            got=f"model_type '{model.config.model_type}' in {folder}: logits off by {(found - expected).abs().max():.2g}",
            allowed="logits that are a linear layer of the final hidden states, scaled or soft-capped",
            fix="choose another model",
        )
    with torch.no_grad():
        longer = torch.cat([ids, ids.flip(1)], dim=1)
        hidden = model.base_model(input_ids=longer, use_cache=False).last_hidden_state[0, : ids.shape[1]]
        moved = (logits_of(model, hidden) - expected).abs().amax(1).min()  # what a tie between experts moves is not every token
    if moved > _MOVED:
        raise ModelFolderError(
            "the trainer cannot train this model: its tokens read what stands behind them, as causal language models do not",
            got=f"model_type '{model.config.model_type}' in {folder}: every token's logits move by {moved:.2g} or more",
            allowed="attention or recurrence over earlier tokens only: sequences of a micro-batch are padded at their end",
            fix="choose a causal language model; of an encoder that can be one, config.json must say so (is_decoder: true)",
        )
