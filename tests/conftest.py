"""What the tests of several areas share: a tiny model folder, and Hypothesis without deadlines."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from oldlogits.models.chat.template import NAMES_ONLY
from order_desk.tiny import TinyMoeSize, TinySize, save_tiny, tiny_model, tiny_tokenizer

from .runs import files_of

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts the tests in the background ignores it

torch.set_num_threads(1)
settings.register_profile("oldlogits", deadline=None, derandomize=True)
settings.load_profile("oldlogits")

WORDS = tuple(f"w{i}" for i in range(20))
"""The words of the tiny tokenizer, besides its special ones."""


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a two-layer model of hidden size 32. Read it only."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = tiny_tokenizer(WORDS)
    size = TinySize(hidden=32, layers=2, heads=2, kv_heads=1, mlp=48, max_context=128)
    model = tiny_model(size, len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id, seed=0)
    save_tiny(folder, model, tokenizer)
    return folder


@pytest.fixture(scope="session")
def tiny_moe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer mixture whose experts matter."""
    folder = tmp_path_factory.mktemp("moe")
    tokenizer = tiny_tokenizer(WORDS)
    size = TinyMoeSize(hidden=32, layers=2, heads=2, kv_heads=1, mlp=48, max_context=128)
    model = tiny_model(size, len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id, seed=0)
    for layer in model.model.layers:
        layer.mlp.gate.weight.data *= 10
        layer.mlp.experts.down_proj.data *= 10
    save_tiny(folder, model, tokenizer)
    return folder


CHATML = NAMES_ONLY + (
    "{%- if tools %}<|im_start|>tools {{ tools | map(attribute='function.name') | join(' ') }}<|im_end|>\n{%- endif %}"
    "{%- for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{%- endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{%- endif %}"
)


@pytest.fixture(scope="session")
def chatml_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as users bring it: a Llama with random weights, a byte-level tokenizer and a ChatML template. Read it only."""
    folder = tmp_path_factory.mktemp("llama")
    special = ["<|im_start|>", "<|im_end|>"]
    vocabulary = {token: i for i, token in enumerate([*special, *sorted(ByteLevel.alphabet())])}
    backend = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer, backend.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", additional_special_tokens=special[:1])
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def shared_files(monkeypatch: pytest.MonkeyPatch) -> Callable[[], set[Path]]:
    """A function that lists files with weights on their way: those of this process and of all that the test has started.

    Tests that run at the same time in other processes kill theirs, which leave files until the next run removes them.
    """
    started, start = {os.getpid()}, BaseProcess.start

    def note(process: BaseProcess) -> None:
        start(process)
        assert process.pid is not None
        started.add(process.pid)

    monkeypatch.setattr(BaseProcess, "start", note)
    return lambda: set().union(*map(files_of, started))
