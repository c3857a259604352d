"""Reads a Hugging Face model folder of the Llama and Qwen family: config.json and safetensors.

What the decoder does not compute has a type of one value below, so that a config with another value is refused by its key.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors.torch import load_file
from torch import Tensor

from oldlogits.core.engine import EngineSpec
from oldlogits.core.errors import ConfigError, ModelFolderError
from oldlogits.engines.embedded.numerics import check_numerics

_EXPECTED: Final = {"int_type": "an integer", "float_type": "a number", "bool_type": "true or false", "missing": "a value"}
"""What a value should have been, by pydantic's name of the error."""


class _Section(BaseModel):
    """A part of config.json: strict types, unknown keys left alone, null as if it were absent."""

    model_config = ConfigDict(strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _without_null(cls, values: object) -> object:
        return {key: value for key, value in values.items() if value is not None} if isinstance(values, dict) else values


class _Rope(_Section):
    """Rotary embeddings without scaling."""

    rope_theta: float | None = None
    rope_type: Literal["default"] = "default"
    partial_rotary_factor: float = Field(default=1.0, ge=1.0, le=1.0)

    @model_validator(mode="before")
    @classmethod
    def _with_one_name(cls, values: object) -> object:
        return {"rope_type": values["type"], **values} if isinstance(values, dict) and "type" in values else values


class DecoderConfig(_Section):
    """The shape of a decoder, under the keys of config.json that it is read from."""

    family: Literal["llama", "qwen2", "qwen3", "qwen3_moe"] = Field(validation_alias="model_type")
    vocab_size: int
    hidden_size: int
    mlp_size: int = Field(validation_alias="intermediate_size")
    num_layers: int = Field(validation_alias="num_hidden_layers")
    num_heads: int = Field(validation_alias="num_attention_heads")
    num_kv_heads: int = Field(validation_alias="num_key_value_heads")
    head_dim: int
    max_positions: int = Field(validation_alias="max_position_embeddings")
    norm_eps: float = Field(default=1e-6, validation_alias="rms_norm_eps")
    base: float = Field(default=10000.0, validation_alias="rope_theta")
    rope_parameters: _Rope = _Rope()
    rope_scaling: _Rope = _Rope()
    attention_bias: bool = False
    tied_head: bool = Field(default=False, validation_alias="tie_word_embeddings")
    hidden_act: Literal["silu"] = "silu"
    mlp_bias: Literal[False] = False
    use_sliding_window: Literal[False] = False
    layer_types: list[Literal["full_attention"]] = []
    decoder_sparse_step: Literal[1] = 1
    mlp_only_layers: list[int] = Field(default=[], max_length=0)
    expert_size: int = Field(default=0, validation_alias="moe_intermediate_size")
    num_experts: int = Field(default=0, validation_alias="num_local_experts")
    num_experts_per_tok: int = 0  # the likeliest so many serve a token, each times its probability
    norm_topk_prob: bool = False  # whether these probabilities are divided by their sum

    @model_validator(mode="before")
    @classmethod
    def _with_defaults(cls, values: object) -> object:
        """Defaults that follow from other keys, and the older name of one."""
        if not isinstance(values, dict):
            return values
        found = {key: value for key, value in values.items() if value is not None}
        hidden, heads = found.get("hidden_size"), found.get("num_attention_heads")
        head_dim = hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads else None
        older = {"num_local_experts": found.get("num_experts", 0)}
        return {"num_key_value_heads": heads, "head_dim": head_dim, **older, **found}

    @property
    def rope_theta(self) -> float:
        """Base of the rotary frequencies; older configs have it at the top."""
        return self.base if self.rope_parameters.rope_theta is None else self.rope_parameters.rope_theta

    @property
    def qkv_bias(self) -> bool:
        """Whether query, key and value projections have a bias."""
        return self.family == "qwen2" or self.attention_bias

    @property
    def output_bias(self) -> bool:
        """Whether the attention's output projection has a bias."""
        return self.family != "qwen2" and self.attention_bias

    @property
    def qk_norm(self) -> bool:
        """Whether query and key heads are RMS-normed."""
        return self.family in ("qwen3", "qwen3_moe")

    @property
    def intermediate_size(self) -> int:
        """Width of the gated MLP, or of each expert."""
        return self.expert_size if self.is_routed else self.mlp_size

    @property
    def is_routed(self) -> bool:
        """Whether each layer has several MLPs, of which a router picks those that serve a token."""
        return self.family == "qwen3_moe"


def read_config(folder: Path) -> DecoderConfig:
    """Read the shape of a model; no config.json, another family or an unsupported feature is a `ModelFolderError`."""
    path = folder / "config.json"
    if not path.is_file():
        raise ModelFolderError(
            "the model folder has no config.json",
            got=str(folder),
            allowed="a Hugging Face model folder",
            fix="save the model with save_pretrained, or correct model.path",
        )
    try:
        config = DecoderConfig.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"] if isinstance(part, str)) or "config.json"
        expected = first.get("ctx", {}).get("expected")
        allowed = str(expected).replace(", ", " or ") if expected else _EXPECTED.get(first["type"], first["msg"])
        raise _unsupported(key, first["input"], allowed, path) from error
    if config.is_routed:
        for key, size in {"hidden_size": config.hidden_size, "moe_intermediate_size": config.expert_size}.items():
            if size % 4:  # grouped_mm wants rows of 16 bytes
                raise _unsupported(f"{key} % 4", size % 4, "0", path)
        if not 1 <= config.num_experts_per_tok <= config.num_experts:
            allowed = " or ".join(map(str, range(1, config.num_experts + 1)))
            raise _unsupported("num_experts_per_tok", config.num_experts_per_tok, allowed, path)
    return config


def decoder_config(spec: EngineSpec) -> DecoderConfig:
    """Read the shape of the model that an engine is to run, and check that it and the engine's size are supported."""
    check_numerics(spec.numerics)
    config = read_config(Path(spec.model_path))
    if spec.max_num_seqs < 1 or not 2 <= spec.max_context <= config.max_positions:
        raise ConfigError(
            "the engine's size is out of range",
            got=f"max_num_seqs = {spec.max_num_seqs}, max_context = {spec.max_context}",
            allowed=f"max_num_seqs >= 1, max_context from 2 to the model's {config.max_positions}",
            fix="correct the engine section of the recipe",
        )
    return config


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All weights of a folder, from model.safetensors or from the shards of its index."""
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


def _unsupported(key: str, value: object, allowed: str, path: Path) -> ModelFolderError:
    return ModelFolderError(
        "the embedded engine does not support this model",
        got=f"{key} = {value!r} in {path}",
        allowed=f"{key} = {allowed}",
        fix="set engine.type = 'vllm', which runs what vLLM runs, or use a plain Llama, Qwen2, Qwen3 or Qwen3-MoE model",
    )
