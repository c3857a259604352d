"""A Qwen3 with random weights and Qwen's own vocabulary of 151,936 tokens, small enough for any machine.

It can do nothing. It shows what a large vocabulary and prompts of several thousand tokens cost, and that all of it runs.
`model.path = "tau2_airline.random_qwen3:random_qwen3"`; the vocabulary lies in the package dashscope, at version 2.0.2.
"""

from __future__ import annotations

import base64
import importlib.util
from itertools import pairwise
from pathlib import Path
from typing import Final

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from oldlogits.core.environment import ModelOrder
from oldlogits.core.errors import ModelFolderError
from oldlogits.models.cache import cached

VOCABULARY_SIZE: Final = 151_936
"""Rows of the embedding: those of the tokenizer, and some that no token has."""

_CONTROL: Final = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_MARKS: Final = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]
_WORDS: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How a text is cut before it is encoded."""
_TEMPLATE: Final = (
    "{%- set has_system = messages[0].role == 'system' -%}"
    "{{- '<|im_start|>system\n' + (messages[0].content if has_system else '') -}}"
    "{%- if tools -%}"
    "{{- '\n\n# Tools\n\nYou may call one of these functions:\n<tools>' -}}"
    "{%- for tool in tools -%}{{- '\n' + (tool | tojson) -}}{%- endfor -%}"
    '{{- \'\n</tools>\n\nTo call one, write <tool_call>{"name": "...", "arguments": {...}}</tool_call>\' -}}'
    "{%- endif -%}"
    "{{- '<|im_end|>\n' -}}"
    "{%- for message in (messages[1:] if has_system else messages) -%}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)


def random_qwen3(order: ModelOrder) -> Path:
    """Return the model's folder: two layers of width 64, 10 million parameters, nearly all of them the embedding.

    Raises:
        ModelFolderError: The package that holds the vocabulary is not installed.
    """
    return cached(order.cache / f"random-qwen3-{order.seed}", lambda folder: _make(folder, order.seed))


def _make(folder: Path, seed: int) -> None:
    tokenizer = qwen_tokenizer(_vocabulary_file())
    config = Qwen3Config(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=32_768,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _vocabulary_file() -> Path:
    found = importlib.util.find_spec("dashscope")
    for place in (found.submodule_search_locations or []) if found else []:
        if (path := Path(place, "resources", "qwen.tiktoken")).is_file():
            return path
    raise ModelFolderError(
        "the vocabulary of Qwen is not there",
        got="no package dashscope with resources/qwen.tiktoken",
        allowed="dashscope 2.0.2, of which nothing but this file is read",
        fix="pip install --no-deps dashscope==2.0.2",
    )


def qwen_tokenizer(vocabulary: Path) -> PreTrainedTokenizerFast:
    """Make the tokenizer of a file of byte sequences in the order of their ranks."""
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, vocabulary.read_text().splitlines())}
    letters = _letters()
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = [tuple(spelled[part] for part in _parts(token, ranks)) for token in ranks if len(token) > 1]
    backend = Tokenizer(BPE(vocab={spelled[token]: rank for token, rank in ranks.items()}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(_CONTROL)
    backend.add_tokens([AddedToken(mark, normalized=False, special=False) for mark in _MARKS])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = _TEMPLATE
    return tokenizer


def _parts(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two parts that a token is merged of: what merging by rank leaves of its bytes before the last merge."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in pairwise(parts)]
        best = pairs.index(min(pairs))
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts


def _letters() -> dict[int, str]:
    """The printable letter that byte-level vocabularies write for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in printable)
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
