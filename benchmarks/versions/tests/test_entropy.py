"""The bound on a version's bytes is the textbook's, whatever the bits."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.versions import entropy
from benchmarks.versions.entropy import binary_entropy, change

WORDS = st.lists(st.tuples(st.integers(-(2**15), 2**15 - 1), st.integers(-(2**15), 2**15 - 1)), min_size=1, max_size=40)


def bf16(words: list[int]) -> torch.Tensor:
    return torch.tensor(words, dtype=torch.int16).view(torch.bfloat16)


def test_the_documented_example():
    found = change(bf16([1, 2, 3, 4]), bf16([1, 2, 3, 9]))
    assert (found.num_values, found.num_changed, found.share, found.num_bytes) == (4, 1, 0.25, 8)
    assert found.value_bits == 0
    assert found.entropy_share == pytest.approx(4 * 0.8112781 / 8 / 8)


def test_bits_count_and_not_values():
    nan, other_nan, zero, minus_zero = 0x7FC0, 0x7FC1, 0, -(2**15)
    assert change(bf16([nan, zero]), bf16([nan, zero])).num_changed == 0
    assert change(bf16([nan, zero]), bf16([other_nan, minus_zero])).num_changed == 2


def test_no_change_costs_nothing_and_certain_change_only_its_value():
    assert change(bf16([1, 2]), bf16([1, 2])).entropy_share == 0
    assert change(bf16([1, 2]), bf16([2, 4])).entropy_share == pytest.approx(2 * 1 / 8 / 4)
    assert binary_entropy(0) == binary_entropy(1) == 0
    assert binary_entropy(0.5) == 1


@given(WORDS)
def test_the_bound_is_the_sum_over_symbols_of_their_information(pairs: list[tuple[int, int]]):
    """Independent: every value is a symbol, 'same' or its wrapping difference; the bound is n times the symbols' entropy."""
    old, new = zip(*pairs, strict=True)
    symbols = Counter((b - a) % 2**16 for a, b in pairs)
    information = -sum(count * math.log2(count / len(pairs)) for count in symbols.values())
    assert change(bf16(list(old)), bf16(list(new))).entropy_share == pytest.approx(
        information / 8 / (2 * len(pairs)), abs=1e-12
    )


@pytest.mark.parametrize("dtype, word", [(torch.float32, np.int32), (torch.float16, np.int16), (torch.int64, np.int64)])
def test_every_width_is_seen_as_words(dtype: torch.dtype, word: type):
    old = torch.tensor([1, 2, 3]).to(dtype)
    new = old.clone()
    new[1] = 7
    assert change(old, new).num_changed == 1
    assert change(old, new).num_bytes == 3 * np.dtype(word).itemsize


def test_chunks_make_no_difference(monkeypatch: pytest.MonkeyPatch):
    old, new = (torch.randint(0, 5, (100,), dtype=torch.int16).view(torch.bfloat16) for _ in range(2))
    whole = change(old, new)
    monkeypatch.setattr(entropy, "_CHUNK", 7)
    in_chunks = change(old, new)
    assert in_chunks.value_bits == pytest.approx(whole.value_bits, rel=1e-12)
    assert replace(in_chunks, value_bits=0.0) == replace(whole, value_bits=0.0)
