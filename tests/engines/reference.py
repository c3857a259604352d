"""Tiny models of each family, and transformers' forward as the oracle of their log-probs."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from oldlogits.core.engine import Generation
from oldlogits.core.trajectory import Sampled, Segment
from oldlogits.models.mixed_kv import cache_keyword

VOCAB = 61
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
SCALED = {
    **{"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0},
    **{"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
}
EXPERTS = {"head_dim": 8, "moe_intermediate_size": 24, "num_experts": 4}
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SHAPE, tie_word_embeddings=False)),
    "llama with attention bias": (LlamaForCausalLM, LlamaConfig(**SHAPE, attention_bias=True)),
    "llama without grouped heads": (LlamaForCausalLM, LlamaConfig(**{**SHAPE, "num_key_value_heads": 4}, head_dim=16)),
    "llama with scaled rotary embeddings": (LlamaForCausalLM, LlamaConfig(**SHAPE, rope_parameters=SCALED)),
    "mistral": (MistralForCausalLM, MistralConfig(**SHAPE, sliding_window=None)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SHAPE, rms_norm_eps=1e-5)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SHAPE, head_dim=16, tie_word_embeddings=True)),
    "qwen3 untied with attention bias": (
        Qwen3ForCausalLM,
        Qwen3Config(**SHAPE, head_dim=8, tie_word_embeddings=False, attention_bias=True, rope_theta=500.0),
    ),
    "qwen3 top-1 of 4 experts": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig(**SHAPE, **EXPERTS, num_experts_per_tok=1, norm_topk_prob=False, tie_word_embeddings=True),
    ),
    "qwen3 top-2 of 4 experts": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig(**SHAPE, **EXPERTS, num_experts_per_tok=2, norm_topk_prob=True),
    ),
}


def make_model(name: str, seed: int = 0, spread: float = 0.15) -> PreTrainedModel:
    """A model whose every parameter, norms and biases included, is random and matters."""
    kind, config = MODELS[name]
    with torch.random.fork_rng():  # Hugging Face draws the first values from the global generator
        torch.manual_seed(seed)
        model = kind(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * spread)
    return model


def save(model: PreTrainedModel, folder: Path) -> str:
    model.save_pretrained(folder)
    return str(folder)


def perturbed(weights: dict[str, Tensor], seed: int, spread: float = 0.1) -> dict[str, Tensor]:
    """New weights; a tied head stays tied."""
    generator = torch.Generator().manual_seed(seed)
    return {name: tensor + torch.randn(tensor.shape, generator=generator) * spread for name, tensor in weights.items()}


def weights_of(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def load(model: PreTrainedModel, weights: dict[str, Tensor]) -> PreTrainedModel:
    model.load_state_dict(weights, strict=False)
    return model


@torch.no_grad()
def logp_of(model: PreTrainedModel, ids: list[int], temperature: float = 1.0) -> list[float]:
    """Of tokens 1, 2, ... of a sequence."""
    logp = torch.log_softmax(model(torch.tensor([ids])).logits[0, :-1].double() / temperature, dim=-1)
    return logp.gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1).tolist()


@torch.no_grad()
def kept_logprobs(model: PreTrainedModel, by_version: dict[int, dict[str, Tensor]], segments: Sequence[Segment]) -> list[float]:
    """Of the sampled tokens of a trajectory, as an engine's cache grows token by token.

    A fresh segment begins with an empty cache; every token then has its version add the entries of the tokens before it.
    """
    ids = torch.tensor([[i for segment in segments for i in segment.token_ids]])
    logprobs, position, cache = [], 0, DynamicCache()
    for segment in segments:
        if isinstance(segment, Sampled):
            load(model, by_version[segment.version])
            cache = DynamicCache() if segment.kv == "fresh" else cache
            for p in range(position, position + len(segment.token_ids)):
                logits = model(ids[:, cache.get_seq_length() : p], **{cache_keyword(model): cache}).logits[0, -1].double()
                logprobs.append(float(torch.log_softmax(logits / segment.temperature, 0)[ids[0, p]]))
        position += len(segment.token_ids)
    return logprobs


def expected_logprobs(
    model: PreTrainedModel,
    by_version: dict[int, dict[str, Tensor]],
    prompt: list[int],
    generation: Generation,
    temperature: float = 1.0,
) -> list[float]:
    """Each output token's log-prob by a full forward with the weights of the version that it is tagged with."""
    expected: list[float] = []
    ids = [*prompt, *generation.output_ids]
    for span in generation.spans:
        logp = logp_of(load(model, by_version[span.version]), ids, temperature)[len(prompt) - 1 :]
        expected += logp[span.start : span.end]
    return expected
