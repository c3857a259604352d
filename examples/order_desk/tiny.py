"""The embedded model: a Qwen3, dense or a mixture of experts, of some hundred thousand parameters; one token a word.

It is an ordinary Hugging Face folder; only its size and its vocabulary, which comes from an environment, are unusual.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from oldlogits.models.chat.template import NAMES_ONLY
from order_desk.starting_models import TinyMoeSize, TinySize

END: Final = "<end>"
PAD: Final = "<pad>"
UNKNOWN: Final = "<unk>"
ROLES: Final = ("<system>", "<user>", "<assistant>", "<tool>")
CALL: Final = ("<call>", "</call>")
SPECIAL: Final = (PAD, UNKNOWN, END, *ROLES)

CHAT_TEMPLATE: Final = (
    NAMES_ONLY + "{%- for message in messages %}"
    "{{ '<' + message['role'] + '> ' + message['content'] }}"
    "{%- if tools and loop.first %}{{ ' tools :' }}"
    "{%- for tool in tools %}{{ ' ' + tool['function']['name'] }}{%- endfor %}"
    "{%- endif %}"
    "{{ ' <end> ' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<assistant>' }}{%- endif %}"
)
"""``<role> content <end>`` for every message; the tools are named at the end of the first one."""


def tiny_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer of `words` and the special tokens; text is split at white space."""
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys([*SPECIAL, *CALL, "tools", ":", *words]))}
    backend = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token=UNKNOWN,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=list(ROLES),
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_config(size: TinySize, vocabulary: int, end_id: int, pad_id: int) -> PreTrainedConfig:
    """Return the config of a model of this size, with as many words and these special tokens."""
    if isinstance(size, TinyMoeSize):
        make_config = Qwen3MoeConfig
        routing = {
            "num_experts": size.experts,
            "num_experts_per_tok": 1,
            "norm_topk_prob": False,
            "moe_intermediate_size": size.mlp,
        }
    else:
        make_config, routing = Qwen3Config, {}
    return make_config(
        vocab_size=vocabulary,
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.hidden // size.heads,
        intermediate_size=size.mlp,
        max_position_embeddings=size.max_context,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=end_id,
        pad_token_id=pad_id,
        dtype="float32",
        **routing,
    )


def tiny_model(size: TinySize, vocabulary: int, end_id: int, pad_id: int, seed: int) -> PreTrainedModel:
    """Return a freshly initialised fp32 model; the same seed gives the same weights."""
    config = tiny_config(size, vocabulary, end_id, pad_id)
    make_model = Qwen3MoeForCausalLM if isinstance(size, TinyMoeSize) else Qwen3ForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make_model(config)


def save_tiny(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write the folder that `AutoModelForCausalLM` and `AutoTokenizer` load."""
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True, temperature=1.0
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
