"""The families: a small config of each, with what makes it one (windows, soft caps, scaled rotary embeddings, experts, states).

Sequences of the checks are longer than the windows, than the length from which Phi-3 rotates otherwise, and than a chunk of a
recurrence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

import transformers
from transformers import PreTrainedConfig

from benchmarks.families import chats
from benchmarks.families.chats import Chat

WINDOW: Final = 16
"""Tokens of a sliding window."""
SHORT: Final = 32
"""Tokens from which "longrope" chooses its other frequencies, and of Llama 3's original context."""

Options = Mapping[str, object]
_PLAIN: Final[Options] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 1024,
}
_SLIDING: Final[Options] = {"sliding_window": WINDOW}
_WIDE: Final[Options] = {"head_dim": 32}
_ALTERNATING: Final[Options] = {
    **_SLIDING,
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention"] * 2 + ["full_attention"],
}
_LLAMA_3: Final[Options] = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": SHORT,
}
_GRANITE: Final[Options] = {
    "logits_scaling": 3.0,
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.2,
}
_HYBRID: Final[Options] = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
_MAMBA: Final[Options] = {
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
}
_EXPERTS: Final[Options] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def _longrope(rotated: float = 1.0) -> Options:
    pairs = int(32 * rotated) // 2
    factors = {"short_factor": [1.0] * pairs, "long_factor": [4.0] * pairs}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": rotated, **factors}
    return {"rope_parameters": rope, "original_max_position_embeddings": SHORT}


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A family of models.

    Args:
        config: The name of its config's class in transformers.
        options: What the config is made of, beside the vocabulary and `_PLAIN`.
        chat: The shape of its chat template.
        is_plain: Whether its config takes the sizes of `_PLAIN`.
    """

    config: str
    chat: Chat
    options: Options = field(default_factory=dict)
    is_plain: bool = True

    def make(self, tokens: Mapping[str, int | None]) -> PreTrainedConfig:
        """Make the config, for a vocabulary whose size and special ids `tokens` holds."""
        make: Callable[..., PreTrainedConfig] = getattr(transformers, self.config)
        return make(**{**(_PLAIN if self.is_plain else {}), **self.options, **tokens})


FAMILIES: Final[Mapping[str, Family]] = MappingProxyType(
    {
        "Llama 3": Family(config="LlamaConfig", chat=chats.LLAMA_3, options={**_WIDE, "rope_parameters": _LLAMA_3}),
        "Mistral": Family(config="MistralConfig", chat=chats.MISTRAL, options={**_WIDE, **_SLIDING}),
        "Mistral, no window": Family(config="MistralConfig", chat=chats.MISTRAL_7, options={**_WIDE, "sliding_window": None}),
        "Ministral 3": Family(config="Ministral3Config", chat=chats.MISTRAL_7, options=_WIDE),
        "Gemma": Family(config="GemmaConfig", chat=chats.GEMMA_2, options=_WIDE),
        "Gemma 2": Family(
            config="Gemma2Config",
            chat=chats.GEMMA_2,
            options={**_WIDE, **_SLIDING, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 2.0},
        ),
        "Gemma 3": Family(config="Gemma3TextConfig", chat=chats.GEMMA_3, options={**_WIDE, **_ALTERNATING}),
        "Qwen 2.5": Family(config="Qwen2Config", chat=chats.QWEN_25, options={"tie_word_embeddings": True}),
        "Qwen 3": Family(config="Qwen3Config", chat=chats.QWEN_3, options={**_WIDE, "tie_word_embeddings": True}),
        "Qwen3-MoE": Family(config="Qwen3MoeConfig", chat=chats.QWEN_3, options={**_WIDE, **_EXPERTS, "norm_topk_prob": True}),
        "Phi-3": Family(config="Phi3Config", chat=chats.PHI_3, options={**_longrope(), **_SLIDING}),
        "Phi-4": Family(config="Phi3Config", chat=chats.PHI_4),
        "Phi-4-mini": Family(
            config="Phi3Config", chat=chats.PHI_4_MINI, options={**_longrope(0.75), "tie_word_embeddings": True}
        ),
        "OLMo 2": Family(config="Olmo2Config", chat=chats.OLMO_2),
        "OLMo 3": Family(config="Olmo3Config", chat=chats.OLMO_3, options=_ALTERNATING),
        "Granite": Family(config="GraniteConfig", chat=chats.GRANITE, options={**_GRANITE, "tie_word_embeddings": True}),
        "SmolLM3": Family(config="SmolLM3Config", chat=chats.SMOLLM_3, options={"no_rope_layers": [1, 0]}),
        "Command R": Family(config="CohereConfig", chat=chats.COHERE, options={"logit_scale": 0.25}),
        "Command R7B": Family(config="Cohere2Config", chat=chats.COHERE, options={**_ALTERNATING, "logit_scale": 0.25}),
        "GPT-2": Family(
            config="GPT2Config",
            chat=chats.CHATML,
            options={"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 1024},
            is_plain=False,
        ),
        "GLM-4": Family(config="Glm4Config", chat=chats.GLM_4, options=_WIDE),
        "Mixtral": Family(config="MixtralConfig", chat=chats.MISTRAL, options={"num_local_experts": 4}),
        "GPT-OSS": Family(
            config="GptOssConfig",
            chat=chats.HARMONY,
            options={**_WIDE, **_SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2},
        ),
        "Qwen3-Next": Family(
            config="Qwen3NextConfig",
            chat=chats.QWEN_3,
            options={
                **{**_WIDE, **_EXPERTS, **_HYBRID, "shared_expert_intermediate_size": 32},
                **{f"linear_{name}": 32 for name in ("key_head_dim", "value_head_dim")},
                **{"linear_num_key_heads": 1, "linear_num_value_heads": 2},
            },
        ),
        "Granite 4": Family(
            config="GraniteMoeHybridConfig",
            chat=chats.GRANITE,
            options={**_GRANITE, **_HYBRID, **_MAMBA, "num_local_experts": 4, "shared_intermediate_size": 32},
        ),
        "Falcon-H1": Family(config="FalconH1Config", chat=chats.CHATML, options={**_MAMBA, "mamba_d_ssm": 128, **_WIDE}),
        "Mamba 2": Family(
            config="Mamba2Config",
            chat=chats.CHATML,
            options={"hidden_size": 64, "num_heads": 4, "head_dim": 32, "state_size": 16, "num_hidden_layers": 2}
            | {"n_groups": 1, "chunk_size": 16},
            is_plain=False,
        ),
    }
)
"""By the names that their makers give them."""
