"""What the tests of several areas share: a tiny model folder, and Hypothesis without deadlines."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import settings

from oldlogits.policy.tiny import TinySize, save_tiny, tiny_model, tiny_tokenizer

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
