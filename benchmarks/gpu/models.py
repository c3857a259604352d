"""Qwen3 models with random weights in the shapes of real ones, as folders that trainer and engine load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from oldlogits.models.chat.template import NAMES_ONLY

_SPECIAL: Final = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_TEMPLATE: Final = (
    NAMES_ONLY
    + "{%- if tools %}<|im_start|>tools {{ tools | map(attribute='function.name') | join(' ') }}<|im_end|>\n{%- endif %}"
    "{%- for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{%- endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{%- endif %}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A Qwen3 with a tied head, under the names of its config."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int = 151_936

    @property
    def num_parameters(self) -> int:
        """Parameters of all matrices, the tied head once; norms are left out."""
        heads = self.num_attention_heads + 2 * self.num_key_value_heads
        attention = self.hidden_size * self.head_dim * (heads + self.num_attention_heads)
        layer = attention + 3 * self.hidden_size * self.intermediate_size
        return self.num_hidden_layers * layer + self.vocab_size * self.hidden_size

    def flops(self, length: int, *, trained: bool) -> float:
        """Operations of one token in a sequence of `length`, without what is computed again.

        Two for each parameter and four for each of the length / 2 tokens that a token sees, each head and layer; three times
        as many where it is trained.
        """
        width = self.num_hidden_layers * self.num_attention_heads * self.head_dim
        forward = 2.0 * self.num_parameters + 2.0 * width * length
        return 3.0 * forward if trained else forward


_SMALL: Final = Shape(
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
)

SHAPES: Final[Mapping[str, Shape]] = {
    "0.6b": _SMALL,
    "4b": Shape(
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
    ),
    "0.5b": replace(_SMALL, vocab_size=32_768),
    "tiny": Shape(
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=512,
    ),
}
"""Shapes of Qwen3-0.6B and Qwen3-4B, as their config.json has them; the first with a smaller vocabulary; and a tiny one."""


def make_folder(folder: Path, shape: Shape, device: torch.device, *, max_context: int = 8192) -> Path:
    """Write a model of a shape with random bf16 weights, and a tokenizer of bytes; drawn on the device."""
    alphabet = [*_SPECIAL, *sorted(ByteLevel.alphabet())]
    backend = Tokenizer(BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=_SPECIAL[2], pad_token=_SPECIAL[0], additional_special_tokens=[_SPECIAL[1]]
    )
    tokenizer.chat_template = _TEMPLATE
    config = Qwen3Config(
        **{name: getattr(shape, name) for name in shape.__dataclass_fields__},
        max_position_embeddings=max_context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen3ForCausalLM(config).to(torch.bfloat16)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
