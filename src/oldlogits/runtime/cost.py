"""What a recipe costs in bytes, before it runs."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path

from oldlogits.config import RunConfig
from oldlogits.core.policies import SOURCES
from oldlogits.policy.tiny import tiny_model
from oldlogits.train.average import AVERAGING_SOURCES
from oldlogits.train.warm_start import spec_of

TINY_VOCABULARY = 128
"""About the words of the order desk."""

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
"""Names of parameters; a tied head has none of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What the size of keys and values depends on."""

    layers: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Bytes of the parts of a run.

    Args:
        num_parameters: Of the model, as its folder stores them.
        weights_bytes: One fp32 copy.
        store_bytes: Versions that the store holds at most; 0 where neither the source nor the referee needs them.
        scorer_bytes: The model and the versions of a dedicated scorer.
        average_bytes: The fp32 average of a source that has one.
        optimizer_bytes: AdamW's two moments and the gradient.
        view_bytes: The trainer's copy of the weights in the engine's numerics, fp32 with a head of its own; none for fp32.
        cache_bytes: The engine's keys and values.
        mixed_bytes: A bound of the keys and values of the mixed-version forward, where OLD is one.
    """

    num_parameters: int
    weights_bytes: int
    store_bytes: int
    scorer_bytes: int
    average_bytes: int
    optimizer_bytes: int
    view_bytes: int
    cache_bytes: int
    mixed_bytes: int

    def lines(self) -> list[str]:
        """One line per part."""
        return [
            f"parameters       {self.num_parameters:,}",
            f"weights          {_mib(self.weights_bytes)} a copy: trainer, engine, and in 'local' the host",
            f"optimizer        {_mib(self.optimizer_bytes)}",
            f"version store    at most {_mib(self.store_bytes)}: one copy, and patches of what changes",
            f"dedicated scorer {_mib(self.scorer_bytes)}",
            f"weight average   {_mib(self.average_bytes)}",
            f"engine's view    {_mib(self.view_bytes)}: the trainer's copy in the engine's numerics",
            f"engine's cache   {_mib(self.cache_bytes)}",
            f"mixed forward    at most {_mib(self.mixed_bytes)}",
        ]


def estimate(config: RunConfig) -> Cost:
    """The bytes that a recipe will take.

    Args:
        config: A checked recipe.
    """
    shape, sizes = _model(config)
    num_parameters = sum(sizes.values())
    weights = 4 * num_parameters
    head = 0 if HEAD in sizes else sizes[EMBEDDING]
    per_token = 2 * 4 * shape.layers * shape.kv_heads * shape.head_dim
    return Cost(
        num_parameters=num_parameters,
        weights_bytes=weights,
        store_bytes=weights * _stored_versions(config),
        scorer_bytes=weights * (config.source.window + 1) if config.source.type == "dedicated" else 0,
        average_bytes=weights if config.source.type in AVERAGING_SOURCES else 0,
        optimizer_bytes=3 * weights,
        view_bytes=0 if config.engine.numerics == "fp32" else weights + 4 * head,
        cache_bytes=config.engine.num_slots * config.env.max_tokens * per_token,
        mixed_bytes=_most_chains(config) * config.env.max_tokens * per_token,
    )


def _most_chains(config: RunConfig) -> int:
    """A bound of a batch's chains of several versions: each holds an update, and after the first each begins with a turn."""
    if config.engine.kv != "stale" or not config.source.accept_mixed_kv:
        return 0
    return config.rollout.groups_per_version * config.rollout.group_size * min(config.window, config.env.max_turns)


def _stored_versions(config: RunConfig) -> int:
    """The most versions in the trainer's store, at the moment of a publish."""
    if config.referee.share > 0 or config.source.type in ("snapshot", "dedicated"):
        return config.window + 2
    return 2 if SOURCES[config.source.type].stores_versions else 0


def _model(config: RunConfig) -> tuple[ModelShape, dict[str, int]]:
    """The shape that the cache depends on, and the number of elements of each parameter."""
    if config.model.is_tiny:
        size = spec_of(config).size
        shape = ModelShape(layers=size.layers, kv_heads=size.kv_heads, head_dim=size.hidden // size.heads)
        model = tiny_model(size, TINY_VOCABULARY, 0, 0, 0)
        return shape, {name: parameter.numel() for name, parameter in model.named_parameters()}
    folder = Path(config.model.path)
    found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    heads = found["num_attention_heads"]
    shape = ModelShape(
        layers=found["num_hidden_layers"],
        kv_heads=found.get("num_key_value_heads", heads),
        head_dim=found.get("head_dim") or found["hidden_size"] // heads,
    )
    return shape, {name: num for path in folder.glob("*.safetensors") for name, num in _num_elements(path).items()}


def _num_elements(path: Path) -> dict[str, int]:
    """Elements of each tensor of a safetensors file, read from its header."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    return {name: math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"
