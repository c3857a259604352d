"""LoRA adapters as tensors: the names that a model with adapters has, and the weights that they stand for.

    base weight W [out, in], frozen     A [rank, in], B [out, rank], trained      what is meant: W + scale B A

Two forward passes compute it. The trainer adds ``scale B (A x)`` to ``W x``; whoever samples is given the adapters and adds
their product to the weights of its base. They differ by rounding: that is r_d, as between any two engines.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

import torch
from torch import Tensor

from oldlogits.core.errors import ModelFolderError

A_SUFFIX: Final = ".lora_A.default.weight"
B_SUFFIX: Final = ".lora_B.default.weight"
BASE_SUFFIX: Final = ".base_layer"
"""What a model with adapters puts between the name of a layer and that of its own parameter."""


def is_adapter(name: str) -> bool:
    """Whether a parameter of a model with adapters belongs to one of them."""
    return name.endswith((A_SUFFIX, B_SUFFIX))


def plain_name(name: str) -> str:
    """The Hugging Face name of a parameter of the base.

    Example:
        >>> plain_name("model.layers.0.self_attn.q_proj.base_layer.weight")
        'model.layers.0.self_attn.q_proj.weight'
    """
    return name.replace(BASE_SUFFIX + ".", ".")


def merged(base: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Form ``W + scale B A`` in float32, the base in the dtype of the adapters.

    The product is formed in float64, so that its rounding does not depend on how a matrix is cut or multiplied.

    Args:
        base: [out, in], or some of its rows.
        a: [rank, in].
        b: [out, rank], the same rows.
        scale: alpha / rank.

    Example:
        W = [[1., 2.]], A = [[3., 4.]], B = [[5.]], scale 0.5: [[1 + 7.5, 2 + 10]] = [[8.5, 12.]]
    """
    return (base.to(a.dtype).double() + scale * (b.double() @ a.double())).to(torch.float32)


def merge(base: Mapping[str, Tensor], adapters: Mapping[str, Tensor], scale: float) -> Mapping[str, Tensor]:
    """Add adapters to the base: all weights in float32 under their Hugging Face names, each formed when it is read.

    Args:
        base: The weights of the base, under their Hugging Face names.
        adapters: All of a version, of one dtype: the trainer's forward dtype, in which the base is read as well.
        scale: alpha / rank.

    Raises:
        ModelFolderError: An adapter belongs to a weight that the base does not have.
    """
    layers = [name.removesuffix(A_SUFFIX) for name in adapters if name.endswith(A_SUFFIX)]
    missing = [layer for layer in layers if f"{layer}.weight" not in base]
    if missing or not layers:
        raise ModelFolderError(
            "the adapters do not fit the base",
            got=f"no weight of {', '.join(missing)}" if missing else f"tensors {', '.join(list(adapters)[:3])}, ...",
            allowed="adapters of the layers of the engine's model",
            fix="give engine and trainer the same model folder",
        )
    return _Merged(base, adapters, scale)


class _Merged(Mapping[str, Tensor]):
    def __init__(self, base: Mapping[str, Tensor], adapters: Mapping[str, Tensor], scale: float) -> None:
        self._base, self._adapters, self._scale = base, adapters, scale
        self._dtype = next(iter(adapters.values())).dtype

    def __getitem__(self, name: str) -> Tensor:
        layer = name.removesuffix(".weight")
        if layer + A_SUFFIX not in self._adapters:
            return self._base[name].to(self._dtype).to(torch.float32)
        return merged(self._base[name], self._adapters[layer + A_SUFFIX], self._adapters[layer + B_SUFFIX], self._scale)

    def __contains__(self, name: object) -> bool:
        return name in self._base  # without forming it

    def __iter__(self) -> Iterator[str]:
        return iter(self._base)

    def __len__(self) -> int:
        return len(self._base)
