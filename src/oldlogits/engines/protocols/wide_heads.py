"""The same model with wider attention heads, for servers whose kernels do not take narrow ones (vLLM: from 32 on).

A head of d dimensions becomes one of D by zeros: dimension i < d/2 stays, i >= d/2 moves up by (D - d)/2, so that rotary
pairs (i, i + d/2) become pairs (i, i + D/2). What the model computes does not change, since

    rotary frequencies   base' = base^(D/d):                 base'^(-2i/D) = base^(-2i/d)
    scores               1/sqrt(D) instead of 1/sqrt(d):     queries times s = sqrt(D/d)
    norms of heads       over D values, D - d of them zero:  normed heads grow by s, in queries just as needed, in keys
                                                             the norm's weight is divided by s

but for rounding, and for the norms' epsilon, which counts s^2 times as much.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import save_file
from torch import Tensor

from oldlogits.core.errors import ModelFolderError
from oldlogits.engines.embedded.model_folder import read_config, read_weights

NARROWEST: Final = 32
"""Dimensions of the narrowest heads that servers take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Widening:
    """From heads of `narrow` dimensions to heads of `wide`; both even. `qk_norm`: heads of queries and keys are normed."""

    narrow: int
    wide: int
    qk_norm: bool

    def weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All weights, those of the attention widened."""
        return {name: self._widened(name, weight) for name, weight in weights.items()}

    def _widened(self, name: str, weight: Tensor) -> Tensor:
        part = name.split(".")[-2] if "self_attn" in name else ""
        growth = math.sqrt(self.wide / self.narrow)
        match part:
            case "q_proj":
                wide = self._along(weight, 0)
                return wide if self.qk_norm else wide * growth
            case "k_proj" | "v_proj" | "q_norm":
                return self._along(weight, 0)
            case "k_norm":
                return self._along(weight, 0) / growth
            case "o_proj":
                return weight if name.endswith("bias") else self._along(weight, 1)
            case _:
                return weight

    def _along(self, weight: Tensor, dim: int) -> Tensor:
        """Zeros between the halves of every head along a dimension."""
        shape = list(weight.shape)
        halves = weight.reshape(*shape[:dim], -1, self.narrow // 2, *shape[dim + 1 :])
        missing = list(halves.shape)
        missing[dim + 1] = (self.wide - self.narrow) // 2
        return torch.cat([halves, halves.new_zeros(missing)], dim=dim + 1).flatten(dim, dim + 1).contiguous()


def widening_of(folder: Path) -> Widening | None:
    """What the heads of a model folder need; None: nothing, or it is of a family that is served as it is."""
    try:
        config = read_config(folder)
    except ModelFolderError:
        return None
    if config.head_dim >= NARROWEST:
        return None
    return Widening(narrow=config.head_dim, wide=NARROWEST, qk_norm=config.qk_norm)


def write_wide(folder: Path, widening: Widening, to: Path) -> None:
    """Write the model folder with wide heads."""
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns("*.safetensors*"), dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    power = widening.wide / widening.narrow
    base = read_config(folder).rope_theta ** power
    config |= {"head_dim": widening.wide}
    if "rope_parameters" in config:
        config["rope_parameters"] |= {"rope_theta": base}
    else:
        config["rope_theta"] = base
    (to / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(widening.weights(read_weights(folder)), to / "model.safetensors", metadata={"format": "pt"})
