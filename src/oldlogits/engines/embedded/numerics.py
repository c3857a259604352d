"""Emulated engine numerics: weights (and, for fp8_dynamic, activations) rounded to a low precision, computed in fp32.

A controlled source of real training-inference discrepancy; it says nothing about speed.

| numerics | linear weights, experts and head | embedding, norms, biases, router | input of each linear and router |
| --- | --- | --- | --- |
| fp32 | as they are | as they are | as it is |
| bf16 | bf16 | bf16 | as it is |
| fp8 | e4m3, scale amax / 448 per output channel | as they are | as it is |
| int8 | symmetric, scale amax / 127 per output channel | as they are | as it is |
| int4 | symmetric, scale amax / 7 per output channel | as they are | as it is |
| fp8_dynamic | as fp8 | as they are | e4m3, scale amax / 448 per token |

A tied head is a rounded copy of the embedding; the embedding look-up itself stays as it is (but for bf16).
"""

from __future__ import annotations

from typing import Final, Literal, cast, get_args

import torch
from torch import Tensor

from oldlogits.core.errors import ConfigError
from oldlogits.core.objective.shapes import Float, Float32

Numerics = Literal["fp32", "bf16", "fp8", "int8", "int4", "fp8_dynamic"]

_E4M3_MAX: Final = 448.0
_INTEGER_MAX: Final[dict[str, float]] = {"int8": 127.0, "int4": 7.0}


def check_numerics(name: str) -> Numerics:
    """Return `name`, if it is one of the engine's numerics."""
    if name not in get_args(Numerics):
        allowed = ", ".join(get_args(Numerics))
        raise ConfigError("unknown engine.precision", got=repr(name), allowed=allowed, fix="choose one of these")
    return cast(Numerics, name)


def round_linear(weight: Float[Tensor, "*expert out in"], numerics: Numerics) -> Float32[Tensor, "*expert out in"]:
    """A rounded fp32 copy of a linear layer's weight (or of those of experts), each output channel with its own scale.

    ``q = round(w / s) * s`` with ``s = amax(|w|) / 448 | 127 | 7`` over a row; round to nearest, ties to even.

    Example:
        A row [1.0, 0.3] in int4 has s = 1/7, so 0.3 becomes 2/7.
    """
    exact = weight.detach().to(torch.float32, copy=True)
    if numerics in ("fp8", "fp8_dynamic"):
        return round_rows_to_e4m3(exact)
    if numerics in _INTEGER_MAX:
        scale = _scale(exact, _INTEGER_MAX[numerics])
        return exact.div_(scale).round_().mul_(scale)
    return round_other(weight, numerics)


def round_other(tensor: Float[Tensor, "*shape"], numerics: Numerics) -> Float32[Tensor, "*shape"]:
    """A float32 copy of an embedding, norm or bias; only bf16 rounds it."""
    exact = tensor.detach().to(torch.float32, copy=True)
    return exact.to(torch.bfloat16).to(torch.float32) if numerics == "bf16" else exact


def round_rows_to_e4m3(rows: Float32[Tensor, "*row feature"]) -> Float32[Tensor, "*row feature"]:
    """Round each row to e4m3 with the scale ``amax(|row|) / 448``."""
    scale = _scale(rows, _E4M3_MAX)
    return (rows / scale).to(torch.float8_e4m3fn).to(torch.float32).mul_(scale)


def _scale(rows: Float32[Tensor, "*row feature"], largest: float) -> Float32[Tensor, "*row 1"]:
    """``amax(|row|) / largest``; 1 for a row of zeros."""
    amax = rows.abs().amax(dim=-1, keepdim=True)
    scale = amax / amax.new_tensor(largest)  # by a number, GPUs multiply with its reciprocal: another last bit
    return scale.masked_fill_(scale == 0, 1.0)
