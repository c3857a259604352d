"""Forward weights, and what the trainer computes with them.

    master (fp32) --round to nearest even--> forward weight --> linear, norm, embedding, experts (in the arithmetic)
       ^----------------- gradient, as float32 -----------------'                   |
                                                                 hidden state --> head --> logits (float32)

A version is the bit pattern of the forward weights. In fp32 arithmetic log-probs depend on the bits alone and not on how a
batch is packed, up to the last bits of float32. In bf16 they depend on the packing as well: docs/exactness.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from types import MappingProxyType
from typing import Final, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from oldlogits.core.errors import ModelFolderError

P = ParamSpec("P")
R = TypeVar("R")

DTYPES: Final[Mapping[str, torch.dtype]] = MappingProxyType({"fp32": torch.float32, "bf16": torch.bfloat16})
"""The types of forward weights and of the arithmetic, by their names in a recipe."""


@dataclass(slots=True)
class Arithmetic:
    """What a model computes in; whoever holds it may change it between two forward passes.

    Args:
        compute: The type of weights and hidden states in products. Norms, softmax and log-probs are float32 inside.
        head: The type of the logits: float32 products of bf16 numbers are exact, and their sums are not rounded to bf16.
    """

    compute: torch.dtype = torch.float32
    head: torch.dtype = torch.float32

    @contextmanager
    def in_fp32(self) -> Iterator[None]:
        """Compute in float32 for a while."""
        before = self.compute, self.head
        self.compute = self.head = torch.float32
        try:
            yield
        finally:
            self.compute, self.head = before


def round_at_use(model: PreTrainedModel, dtype: torch.dtype, arithmetic: Arithmetic | None = None) -> None:
    """Let every module of a model read its parameters rounded to `dtype`, in an arithmetic; by default in float32.

    Nothing happens for float32. The parameters may hold masters, which receive the gradient with respect to the rounded values,
    or forward weights. The model is changed in place; copies of it must be made before.

    Raises:
        ModelFolderError: Its layers ask the parameters of other modules what to compute in, and would be told float32.
    """
    if dtype == torch.float32:
        return
    arithmetic = arithmetic or Arithmetic()
    if arithmetic.compute != torch.float32 and hasattr(model.config, "residual_in_fp32"):
        raise ModelFolderError(
            "the trainer cannot train this model in bf16 arithmetic: its layers compute in the type of the masters",
            got=f"model_type '{model.config.model_type}', trainer.compute = 'bf16'",
            allowed="trainer.compute = 'fp32' (model.forward_dtype may be 'bf16')",
            fix="remove trainer.compute",
        )
    head = model.get_output_embeddings()
    head.rounding = dtype, arithmetic
    for module in model.modules():
        if next(module.parameters(recurse=False), None) is not None:
            forward = under(partial(_ReadRounded, dtype, arithmetic), module.forward)
            module.forward = partial(_head, head, module.forward, dtype, arithmetic) if module is head else forward


def rounding_of(head: nn.Module) -> tuple[torch.dtype | None, Arithmetic | None]:
    """Tell what `round_at_use` was told of the model whose head this is: the forward dtype, the arithmetic; None: nothing."""
    return getattr(head, "rounding", (None, None))


def under(mode: Callable[[], TorchFunctionMode], forward: Callable[P, R]) -> Callable[P, R]:
    """Wrap a module's forward so that every call of it runs under a mode of its own."""

    @wraps(forward)
    def within(*args: P.args, **kwargs: P.kwargs) -> R:
        with mode():
            return forward(*args, **kwargs)

    return within


class _ReadRounded(TorchFunctionMode):
    """Hands rounded weights to every function that is given a parameter; each is rounded once in a module's forward."""

    def __init__(self, dtype: torch.dtype, arithmetic: Arithmetic) -> None:
        super().__init__()
        self._dtype, self._compute = dtype, arithmetic.compute
        self._rounded: dict[int, Tensor] = {}

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Iterable[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        if _is_lookup(func):  # look up, then round: only the rows that are read
            rows = func(*args, **kwargs)
            assert isinstance(rows, Tensor)
            return _round(rows, self._dtype, self._compute)
        return func(*map(self._read, args), **{name: self._read(value) for name, value in kwargs.items()})

    def _read(self, value: object) -> object:
        if not isinstance(value, nn.Parameter):
            return value
        if id(value) not in self._rounded:
            self._rounded[id(value)] = _round(value, self._dtype, self._compute)
        return self._rounded[id(value)]


def _is_lookup(func: Callable[..., object]) -> bool:
    return func is nn.functional.embedding


def _round(weight: Tensor, dtype: torch.dtype, compute: torch.dtype) -> Tensor:
    rounded: Tensor = _StraightThrough.apply(weight, dtype, compute)  # type: ignore[no-untyped-call]
    return rounded


class _StraightThrough(torch.autograd.Function):
    """Rounds; the gradient passes as it is, as float32."""

    @staticmethod
    def forward(ctx: object, weight: Tensor, dtype: torch.dtype, compute: torch.dtype) -> Tensor:
        """Round to the nearest values of `dtype`, and give them in the type that is computed in."""
        return weight.to(dtype).to(compute)

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Pass on the gradient of the rounded values."""
        return gradients[0].float(), None, None


def _head(
    head: nn.Linear, forward: Callable[[Tensor], Tensor], dtype: torch.dtype, arithmetic: Arithmetic, hidden: Tensor
) -> Tensor:
    """Form the logits of hidden states with the rounded weights of the head: by `forward`, or without rounding the sums."""
    if arithmetic.compute == arithmetic.head:
        with _ReadRounded(dtype, arithmetic):
            return forward(hidden)
    rows = hidden.reshape(-1, hidden.shape[-1])
    logits: Tensor = _WideProduct.apply(rows, head.weight, dtype)  # type: ignore[no-untyped-call]
    logits = logits.view(*hidden.shape[:-1], -1)
    return logits if head.bias is None else logits + _round(head.bias, dtype, torch.float32)


class _WideProduct(torch.autograd.Function):
    """The product of bf16 numbers with float32 sums, which a GPU makes as fast as a bf16 one; so are those of its backward.

    The gradient of the logits is rounded to bf16 as that of every other product is.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Form float32 [row, vocab] of hidden [row, width] and weight [vocab, width]."""
        rounded = weight.to(dtype)
        ctx.save_for_backward(hidden, rounded)
        return wide_product(hidden, rounded.t())

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        """Give the gradients of hidden states, in their type, and of the weight, in float32."""
        hidden, rounded = ctx.saved_tensors  # type: ignore[attr-defined]
        gradient = gradients[0].to(rounded.dtype)
        return gradient @ rounded, wide_product(gradient.t(), hidden), None


def wide_product(left: Tensor, right: Tensor) -> Tensor:
    """Multiply matrices of bf16 numbers with float32 sums, which a GPU does as fast as with bf16 ones."""
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()
