"""What an embedded engine is built from, and what it counts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from oldlogits.core.engine import EngineCapabilities
from oldlogits.core.errors import ConfigError
from oldlogits.core.weights import PolicyVersion
from oldlogits.engines.embedded.model_folder import DecoderConfig, read_config
from oldlogits.engines.embedded.numerics import Numerics, check_numerics
from oldlogits.engines.timing import Line


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """What an embedded engine is built from.

    Args:
        model_path: A Hugging Face model folder (Llama, Qwen2, Qwen3 or Qwen3-MoE); its weights are version 0.
        numerics: How weights are rounded.
        max_num_seqs: Sequences decoded at the same time.
        max_context: The most tokens of one sequence.
        seed: Of the sampler.
        adapter_scale: Updates bring LoRA adapters, whose product, scaled by this, is added to the folder's weights; 0: they
            bring all weights.
    """

    model_path: str
    numerics: Numerics = "fp32"
    max_num_seqs: int = 128
    max_context: int = 512
    seed: int = 0
    adapter_scale: float = 0.0

    @property
    def capabilities(self) -> EngineCapabilities:
        """What such an engine can do."""
        return EngineCapabilities(
            max_context=self.max_context,
            partials=True,
            kv_modes=frozenset({"recompute", "stale"}),
            numerics=self.numerics,
        )

    def read_config(self) -> DecoderConfig:
        """The shape of the model.

        Raises:
            ModelFolderError: The folder is missing or not supported.
            ConfigError: Unknown numerics, no slots, or a context longer than the model's.
        """
        check_numerics(self.numerics)
        config = read_config(Path(self.model_path))
        if self.max_num_seqs < 1 or not 2 <= self.max_context <= config.max_positions:
            raise ConfigError(
                "the engine's size is out of range",
                got=f"max_num_seqs = {self.max_num_seqs}, max_context = {self.max_context}",
                allowed=f"max_num_seqs >= 1, max_context from 2 to the model's {config.max_positions}",
                fix="correct the engine section of the recipe",
            )
        return config


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Counters since the engine was built.

    Args:
        version: The version of its weights.
        num_steps: Engine steps.
        num_decode_tokens: Sampled tokens.
        num_prefill_tokens: Prompt tokens computed, recomputation included.
        num_prefix_hit_tokens: Prompt tokens that were found in the cache instead.
        busy_s: Seconds inside `EngineCore.step`.
        idle_s: Seconds outside it.
        waiting_s: The part of them with nothing to do: paused, or nothing to sample.
        num_requests: Requests taken.
        decode: Decode steps; the size of one is the sequences that it decoded.
        prefill: Prefills between two decode steps; the size of one is the tokens that it computed.
    """

    version: PolicyVersion
    num_steps: int
    num_decode_tokens: int
    num_prefill_tokens: int
    num_prefix_hit_tokens: int
    busy_s: float
    idle_s: float
    waiting_s: float = 0.0
    num_requests: int = 0
    decode: Line = field(default_factory=Line)
    prefill: Line = field(default_factory=Line)


@dataclass(frozen=True, slots=True, kw_only=True)
class Incident:
    """Something happened to a server.

    Args:
        what: It went down, or came back.
        server: Its address.
        reason: Why it counts as down, or what was done before it counted as up.
        num_requests: That ran on it and are sent again.
        num_kept_tokens: That these have sampled and keep.
        num_lost_tokens: That the server had sampled, by its own count at the last look, and that did not arrive: a lower bound;
            None: it does not count.
        is_failure: Not if it was asked to leave.
    """

    what: Literal["down", "up"]
    server: str
    reason: str
    num_requests: int = 0
    num_kept_tokens: int = 0
    num_lost_tokens: int | None = None
    is_failure: bool = True
