"""Reads a Hugging Face model folder of the Llama and Qwen family: config.json and safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn

from safetensors.torch import load_file
from torch import Tensor

from oldlogits.core.errors import ModelFolderError

FAMILIES: Final = ("llama", "qwen2", "qwen3", "qwen3_moe")


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """How the tokens of a mixture of experts find their gated MLPs.

    Args:
        num_experts: Gated MLPs of each layer.
        num_chosen: The likeliest so many serve a token, each times its probability.
        normed: The probabilities of the chosen ones are divided by their sum.
    """

    num_experts: int
    num_chosen: int
    normed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """The shape of a decoder.

    Args:
        vocab_size: Rows of the embedding.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the gated MLP, or of each expert.
        num_layers: Layers.
        num_heads: Query heads.
        num_kv_heads: Key and value heads; divides num_heads.
        head_dim: Width of a head, even.
        max_positions: The longest sequence that the model was made for.
        norm_eps: Epsilon of the RMS norms.
        rope_theta: Base of the rotary frequencies.
        qkv_bias: Query, key and value projections have a bias.
        output_bias: The attention's output projection has a bias.
        qk_norm: Query and key heads are RMS-normed.
        tied_head: The head is the embedding.
        routing: Of a mixture of experts; None where each layer has one MLP.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float
    rope_theta: float
    qkv_bias: bool
    output_bias: bool
    qk_norm: bool
    tied_head: bool
    routing: Routing | None


def read_config(folder: Path) -> DecoderConfig:
    """The shape of the model in `folder`.

    Raises:
        ModelFolderError: No config.json, another family, or a feature that is not supported.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ModelFolderError(
            "the model folder has no config.json",
            got=str(folder),
            allowed="a Hugging Face model folder",
            fix="save the model with save_pretrained, or correct model.path",
        )
    raw = _Raw(json.loads(path.read_text(encoding="utf-8")), path)
    family = raw.text("model_type", "")
    raw.require("model_type", family, *FAMILIES)
    _refuse_unsupported(raw)
    num_heads = raw.integer("num_attention_heads")
    attention_bias = raw.flag("attention_bias", False)
    routing = _read_routing(raw) if family == "qwen3_moe" else None
    return DecoderConfig(
        vocab_size=raw.integer("vocab_size"),
        hidden_size=raw.integer("hidden_size"),
        intermediate_size=raw.integer("intermediate_size" if routing is None else "moe_intermediate_size"),
        num_layers=raw.integer("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=raw.integer("num_key_value_heads", num_heads),
        head_dim=raw.integer("head_dim", raw.integer("hidden_size") // num_heads),
        max_positions=raw.integer("max_position_embeddings"),
        norm_eps=raw.number("rms_norm_eps", 1e-6),
        rope_theta=raw.section("rope_parameters").number("rope_theta", raw.number("rope_theta", 10000.0)),
        qkv_bias=family == "qwen2" or attention_bias,
        output_bias=family != "qwen2" and attention_bias,
        qk_norm=family in ("qwen3", "qwen3_moe"),
        tied_head=raw.flag("tie_word_embeddings", False),
        routing=routing,
    )


def _read_routing(raw: _Raw) -> Routing:
    """How tokens are routed, where every layer is a mixture."""
    raw.require("decoder_sparse_step", raw.integer("decoder_sparse_step", 1), 1)
    raw.require("mlp_only_layers", raw.texts("mlp_only_layers"), [])
    for key in ("hidden_size", "moe_intermediate_size"):
        raw.require(f"{key} % 4", raw.integer(key) % 4, 0)  # rows of 16 bytes, for grouped_mm
    num_experts = raw.integer("num_local_experts", raw.integer("num_experts", 0))
    num_chosen = raw.integer("num_experts_per_tok")
    raw.require("num_experts_per_tok", num_chosen, *range(1, num_experts + 1))
    return Routing(num_experts=num_experts, num_chosen=num_chosen, normed=raw.flag("norm_topk_prob", False))


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All weights of a folder, from model.safetensors or from the shards of its index.

    Raises:
        ModelFolderError: There are no safetensors, or a shard is missing.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        shards = ["model.safetensors"]
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise ModelFolderError(
            "the model folder lacks weights",
            got=f"no {', '.join(missing)} in {folder}",
            allowed="model.safetensors, or model.safetensors.index.json and its shards",
            fix="save the model with save_pretrained",
        )
    weights: dict[str, Tensor] = {}
    for shard in shards:
        weights.update(load_file(folder / shard))
    return weights


class _Raw:
    """A JSON object whose values are read with their type checked."""

    def __init__(self, values: object, path: Path) -> None:
        self._values: Mapping[str, object] = values if isinstance(values, dict) else {}
        self._path = path

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._get(key, default)
        return value if isinstance(value, int) else self._fail(key, value, "an integer")

    def number(self, key: str, default: float) -> float:
        value = self._get(key, default)
        return float(value) if isinstance(value, int | float) else self._fail(key, value, "a number")

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        return value if isinstance(value, bool) else self._fail(key, value, "true or false")

    def text(self, key: str, default: str) -> str:
        value = self._get(key, default)
        return value if isinstance(value, str) else self._fail(key, value, "a string")

    def texts(self, key: str) -> list[str]:
        value = self._get(key, [])
        return [str(item) for item in value] if isinstance(value, list) else self._fail(key, value, "a list")

    def section(self, key: str) -> _Raw:
        return _Raw(self._values.get(key), self._path)

    def require(self, key: str, value: object, *allowed: object) -> None:
        """Refuse a value that is not among those allowed."""
        if value not in allowed:
            self._fail(key, value, " or ".join(map(repr, allowed)))

    def _get(self, key: str, default: object) -> object:
        value = self._values.get(key)
        return default if value is None else value

    def _fail(self, key: str, value: object, allowed: str) -> NoReturn:
        raise ModelFolderError(
            "the embedded engine does not support this model",
            got=f"{key} = {value!r} in {self._path}",
            allowed=f"{key} = {allowed}",
            fix="use a plain Llama, Qwen2, Qwen3 or Qwen3-MoE model, or another engine.type",
        )


def _refuse_unsupported(raw: _Raw) -> None:
    """Refuse scaled rotary embeddings, sliding windows and other activations."""
    raw.require("hidden_act", raw.text("hidden_act", "silu"), "silu")
    raw.require("mlp_bias", raw.flag("mlp_bias", False), False)
    raw.require("use_sliding_window", raw.flag("use_sliding_window", False), False)
    for layer_type in raw.texts("layer_types"):
        raw.require("layer_types", layer_type, "full_attention")
    for key in ("rope_parameters", "rope_scaling"):
        rope = raw.section(key)
        kind = rope.text("rope_type", rope.text("type", "default"))
        raw.require(f"{key}.rope_type", kind, "default")
        raw.require(f"{key}.partial_rotary_factor", rope.number("partial_rotary_factor", 1.0), 1.0)
