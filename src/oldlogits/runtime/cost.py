"""What a recipe costs in bytes, before it runs."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path

from oldlogits.config import RunConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Bytes of the parts of a run.

    Args:
        num_parameters: Of the model, as its folder stores them.
        weights_bytes: One fp32 copy.
        store_bytes: Versions that the snapshot store holds at most; 0 for other sources.
        optimizer_bytes: AdamW's two moments and the gradient.
        cache_bytes: The engine's keys and values.
    """

    num_parameters: int
    weights_bytes: int
    store_bytes: int
    optimizer_bytes: int
    cache_bytes: int

    def lines(self) -> list[str]:
        """One line per part."""
        return [
            f"parameters       {self.num_parameters:,}",
            f"weights          {_mib(self.weights_bytes)} a copy: trainer, engine; the scoring module shares the store's",
            f"optimizer        {_mib(self.optimizer_bytes)}",
            f"version store    {_mib(self.store_bytes)}",
            f"engine's cache   {_mib(self.cache_bytes)}",
        ]


def estimate(config: RunConfig) -> Cost:
    """The bytes that a recipe will take.

    Args:
        config: A checked recipe.
    """
    shape, num_parameters = _model(config)
    weights = 4 * num_parameters
    per_token = 2 * 4 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * shape["head_dim"]
    return Cost(
        num_parameters=num_parameters,
        weights_bytes=weights,
        store_bytes=weights * (config.window + 2) if config.source.type == "snapshot" else weights,
        optimizer_bytes=3 * weights,
        cache_bytes=config.engine.num_slots * config.env.max_tokens * per_token,
    )
