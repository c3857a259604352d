"""Forward weights: what the trainer's forward pass reads of its masters, rounded to `model.forward_dtype` at their use.

    master (fp32) --round to nearest even--> forward weight --as fp32--> linear, norm, embedding, experts
       ^------------------------- gradient as it is ----------------------------'

A version is the bit pattern of the forward weights. The arithmetic is that of fp32 whatever their dtype: then log-probs depend
on the bits alone and not on how a batch is packed, and a store's bf16 bits give what the masters gave at their publish.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial, wraps
from types import MappingProxyType
from typing import Final, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

P = ParamSpec("P")
R = TypeVar("R")

FORWARD_DTYPES: Final[Mapping[str, torch.dtype]] = MappingProxyType({"fp32": torch.float32, "bf16": torch.bfloat16})
"""The types of forward weights, by their names in a recipe."""


def round_at_use(model: nn.Module, dtype: torch.dtype) -> None:
    """Let every module of a model read its parameters rounded to `dtype`, as float32; nothing happens for float32.

    The parameters may hold masters, which receive the gradient with respect to the rounded values, or forward weights.
    The model is changed in place; copies of it must be made before.
    """
    if dtype == torch.float32:
        return
    for module in model.modules():
        if next(module.parameters(recurse=False), None) is not None:
            module.forward = under(partial(_ReadRounded, dtype), module.forward)


def under(mode: Callable[[], TorchFunctionMode], forward: Callable[P, R]) -> Callable[P, R]:
    """Wrap a module's forward so that every call of it runs under a mode of its own."""

    @wraps(forward)
    def within(*args: P.args, **kwargs: P.kwargs) -> R:
        with mode():
            return forward(*args, **kwargs)

    return within


class _ReadRounded(TorchFunctionMode):
    """Hands rounded weights to every function that is given a parameter; each is rounded once in a module's forward."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype
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
            return _round(rows, self._dtype)
        return func(*map(self._read, args), **{name: self._read(value) for name, value in kwargs.items()})

    def _read(self, value: object) -> object:
        if not isinstance(value, nn.Parameter):
            return value
        if id(value) not in self._rounded:
            self._rounded[id(value)] = _round(value, self._dtype)
        return self._rounded[id(value)]


def _round(weight: Tensor, dtype: torch.dtype) -> Tensor:
    rounded: Tensor = _StraightThrough.apply(weight, dtype)  # type: ignore[no-untyped-call]
    return rounded


def _is_lookup(func: Callable[..., object]) -> bool:
    return func is nn.functional.embedding


class _StraightThrough(torch.autograd.Function):
    """Rounds; the gradient passes as it is."""

    @staticmethod
    def forward(ctx: object, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Round to the nearest values of `dtype`, as float32."""
        return weight.to(dtype).to(torch.float32)

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> tuple[Tensor, None]:
        """Pass on the gradient of the rounded values."""
        return gradients[0], None
