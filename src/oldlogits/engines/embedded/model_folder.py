"""Reads a Hugging Face model folder of the Llama and Qwen family: config.json and safetensors.

What the decoder does not compute has a type of one value below, so that a config with another value is refused by its key.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError
from safetensors.torch import load_file
from torch import Tensor

from oldlogits.core.engine import EngineSpec
from oldlogits.core.errors import ConfigError, ModelFolderError, reading
from oldlogits.engines.embedded.numerics import check_numerics
from oldlogits.models.finite import check_finite

_AGAIN: Final = "copy config.json again from where the model came from"
_LACKS: Final = frozenset({"literal_error", "too_long", "greater_than_equal", "less_than_equal"})
"""What pydantic calls values that other decoders compute and this one does not."""
_EXPECTED: Final = {"int_type": "an integer", "float_type": "a number", "bool_type": "true or false", "missing": "a value"}
"""What a value should have been, by pydantic's name of the error."""


_Size = Annotated[int, Field(gt=0, lt=2**31)]
_Finite = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Section(BaseModel):
    """A part of config.json: strict types, unknown keys left alone, null as if it were absent."""

    model_config = ConfigDict(strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _without_null(cls, values: object) -> object:
        return {key: value for key, value in values.items() if value is not None} if isinstance(values, dict) else values


class _Rope(_Section):
    """Rotary embeddings as they are, or scaled as Llama 3's."""

    rope_theta: _Finite | None = None
    rope_type: Literal["default", "llama3"] = "default"
    partial_rotary_factor: float = Field(default=1.0, ge=1.0, le=1.0)
    factor: _Finite = 0.0
    low_freq_factor: _Finite = 0.0
    high_freq_factor: _Finite = 0.0
    original: _Size = Field(default=0, validation_alias="original_max_position_embeddings")

    @model_validator(mode="before")
    @classmethod
    def _with_one_name(cls, values: object) -> object:
        return {"rope_type": values["type"], **values} if isinstance(values, dict) and "type" in values else values

    @model_validator(mode="after")
    def _is_whole(self) -> _Rope:
        if self.rope_type == "llama3" and not (
            self.factor and self.original and 0 < self.low_freq_factor < self.high_freq_factor
        ):
            keys = "factor, original_max_position_embeddings and low_freq_factor < high_freq_factor"
            raise PydanticCustomError("incomplete", f"one with {keys}")
        return self


class DecoderConfig(_Section):
    """The shape of a decoder, under the keys of config.json that it is read from."""

    family: Literal["llama", "qwen2", "qwen3", "qwen3_moe", "mistral"] = Field(validation_alias="model_type")
    vocab_size: _Size
    hidden_size: _Size
    mlp_size: _Size = Field(validation_alias="intermediate_size")
    num_layers: _Size = Field(validation_alias="num_hidden_layers")
    num_heads: _Size = Field(validation_alias="num_attention_heads")
    num_kv_heads: _Size = Field(validation_alias="num_key_value_heads")
    head_dim: _Size
    max_positions: _Size = Field(validation_alias="max_position_embeddings")
    norm_eps: _Finite = Field(default=1e-6, validation_alias="rms_norm_eps")
    base: _Finite = Field(default=10000.0, validation_alias="rope_theta")
    rope_parameters: _Rope = _Rope()
    rope_scaling: _Rope = _Rope()
    attention_bias: bool = False
    tied_head: bool = Field(default=False, validation_alias="tie_word_embeddings")
    hidden_act: Literal["silu"] = "silu"
    mlp_bias: Literal[False] = False
    use_sliding_window: Literal[False] = False
    sliding_window: int | None = None
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
    def rope(self) -> _Rope:
        """How rotary embeddings are scaled; older configs have it under a name of its own."""
        return self.rope_scaling if self.rope_parameters.rope_type == "default" else self.rope_parameters

    @property
    def window(self) -> int:
        """The most tokens, its own included, that a token attends to; 0: all before it."""
        return self.sliding_window or 0 if self.family == "mistral" else 0

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
        with reading(ModelFolderError, "config.json cannot be read", got=str(path), allowed="a JSON object", fix=_AGAIN):
            content = path.read_bytes()
        config = DecoderConfig.model_validate_json(content)
    except ValidationError as error:
        raise _refusal(error, path) from error
    for key, size, by in (
        ("num_attention_heads % num_key_value_heads", config.num_heads, config.num_kv_heads),
        ("head_dim % 2", config.head_dim, 2),
    ):
        if size % by:
            raise _broken(key, size % by, "0", path)
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
            fix="correct engine.max_num_seqs or env.max_episode_tokens (`oldlogits serve`: --max-num-seqs, --max-context)",
        )
    if config.window and spec.max_context > config.window:  # no shorter sequence is changed by it
        allowed = f"no less than the most tokens of a sequence, {spec.max_context}"
        raise _unsupported("sliding_window", config.window, allowed, Path(spec.model_path) / "config.json")
    return config


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All weights of a folder, from model.safetensors or from the shards of its index; all of them finite."""
    index, fix = folder / "model.safetensors.index.json", "copy the weights again, or save the model with save_pretrained"
    allowed = "model.safetensors, or model.safetensors.index.json and its shards"
    weights: dict[str, Tensor] = {}
    with reading(ModelFolderError, "the weights cannot be read", got=str(folder), allowed=allowed, fix=fix):
        shards = ["model.safetensors"]  # where there are both, transformers takes this one, too
        if index.is_file() and not (folder / shards[0]).is_file():
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if missing := [shard for shard in shards if not (folder / shard).is_file()]:
            got = f"no {', '.join(missing)} in {folder}"
            raise ModelFolderError("the model folder lacks weights", got=got, allowed=allowed, fix=fix)
        for shard in shards:
            weights.update(load_file(folder / shard))
    check_finite(weights, folder)
    return weights


def _refusal(error: ValidationError, path: Path) -> ModelFolderError:
    """One of pydantic's errors in this project's form: a feature that the decoder lacks, or a value that no model has."""
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"] if isinstance(part, str)) or "config.json"
    expected = first.get("ctx", {}).get("expected")
    allowed = str(expected).replace(", ", " or ") if expected else _EXPECTED.get(first["type"], first["msg"])
    return (_unsupported if first["type"] in _LACKS else _broken)(key, first["input"], allowed, path)


def _broken(key: str, value: object, allowed: str, path: Path) -> ModelFolderError:
    return ModelFolderError(
        "config.json is no model's", got=f"{key} = {repr(value)[:200]} in {path}", allowed=f"{key} = {allowed}", fix=_AGAIN
    )


def _unsupported(key: str, value: object, allowed: str, path: Path) -> ModelFolderError:
    return ModelFolderError(
        "the embedded engine does not support this model",
        got=f"{key} = {repr(value)[:200]} in {path}",
        allowed=f"{key} = {allowed}",
        fix="use a Llama, Mistral, Qwen2, Qwen3 or Qwen3-MoE model, or for `oldlogits train` one that vLLM runs, with "
        "engine.type = 'vllm'",
    )
