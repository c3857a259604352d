"""The digest against big integers of Python, and what it is there to notice."""

import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oldlogits.versions import FlatWeights, Shard, encode
from oldlogits.versions.patches.digest import key_of, signed, terms
from oldlogits.versions.patches.layout import WORDS
from tests.versions.kernel_choice import CHOICES, kernels

MODULUS = 1 << 64
FLOATS = {1: torch.float8_e4m3fn, 2: torch.bfloat16, 4: torch.float32, 8: torch.float64}


def term(key, index, word):
    """The definition, in integers without end."""
    z = (key + index * 0x9E3779B97F4A7C15 + word * 0xD6E8FEB86659FD93) % MODULUS
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % MODULUS
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % MODULUS
    return z ^ (z >> 31)


some = st.integers(1, 40)


def words_of_width(width, size=some):
    low, high = -(1 << 8 * width - 1), (1 << 8 * width - 1) - 1
    return size.flatmap(lambda n: st.lists(st.integers(low, high), min_size=n, max_size=n))


widths_and_words = st.sampled_from((1, 2, 4, 8)).flatmap(lambda width: st.tuples(st.just(width), words_of_width(width)))


def weights_of(width, words):
    return torch.tensor(words, dtype=WORDS[width]).view(FLOATS[width])


def test_the_key_of_a_name_is_its_blake2b():
    expected = hashlib.blake2b(b"model.norm.weight", digest_size=8).digest()
    assert key_of("model.norm.weight") == sum(byte << 8 * i for i, byte in enumerate(expected))
    assert signed(key_of("")) % MODULUS == key_of("")


@given(widths_and_words, st.integers(0, 2**40), st.text(max_size=5))
def test_terms_are_their_definition(case, first, name):
    width, words = case
    indices = torch.arange(first, first + len(words))
    found = terms(signed(key_of(name)), indices, torch.tensor(words, dtype=WORDS[width]))
    expected = [term(key_of(name), first + i, word % (1 << 8 * width)) for i, word in enumerate(words)]
    assert [value % MODULUS for value in found.tolist()] == expected


@pytest.mark.slow
@pytest.mark.parametrize("choice", CHOICES)
@given(widths_and_words)
def test_a_digest_is_the_sum_of_the_terms_of_all_elements_by_name_and_index(choice, case):
    width, words = case
    tensors = {"b": weights_of(width, words), "a": weights_of(width, words[::-1])}
    expected = sum(
        term(key_of(name), i, word % (1 << 8 * width))
        for name, row in (("a", words[::-1]), ("b", words))
        for i, word in enumerate(row)
    )
    with kernels(choice):
        assert FlatWeights.of(tensors).digest == expected % MODULUS


@pytest.mark.slow
@given(widths_and_words, st.data())
def test_digests_of_shards_add_up_to_that_of_the_whole(case, data):
    width, words = case
    cuts = sorted(data.draw(st.lists(st.integers(0, len(words)), max_size=4)))
    whole, total = weights_of(width, words), 0
    for start, stop in zip([0, *cuts], [*cuts, len(words)], strict=True):
        shard = Shard(shape=(len(words),), start=start, stop=stop)
        total += FlatWeights.of({"w": whole[start:stop]}, shards={"w": shard}).digest
    assert total % MODULUS == FlatWeights.of({"w": whole}).digest


@pytest.mark.slow
@given(widths_and_words, st.data())
def test_one_wrong_word_changes_the_digest_with_certainty(case, data):
    width, words = case
    weights = FlatWeights.of({"w": weights_of(width, words)})
    at = data.draw(st.integers(0, len(words) - 1))
    wrong = data.draw(st.integers(-(1 << 8 * width - 1), (1 << 8 * width - 1) - 1).filter(lambda w: w != words[at]))
    weights.words(FLOATS[width])[at] = wrong
    assert weights.full_digest() != weights.digest


@pytest.mark.slow
@given(words_of_width(2, st.integers(2, 20)), st.data())
def test_two_values_that_change_places_change_the_digest(words, data):
    i, j = data.draw(st.tuples(*[st.integers(0, len(words) - 1)] * 2))
    swapped = [words[{i: j, j: i}.get(k, k)] for k in range(len(words))]
    digests = [FlatWeights.of({"w": weights_of(2, row)}).digest for row in (words, swapped)]
    assert (digests[0] != digests[1]) == (swapped != words)


def test_the_same_values_under_another_name_have_another_digest():
    values = torch.arange(9.0)
    assert FlatWeights.of({"a": values}).digest != FlatWeights.of({"b": values}).digest


def test_frozen_tensors_aliases_and_padding_are_in_no_digest():
    values = torch.arange(9.0)
    plain = FlatWeights.of({"a": values})
    tied = FlatWeights.of({"a": values, "b": values, "c": torch.ones(3)}, frozen=["c"])
    assert tied.digest == plain.digest


def test_opposite_changes_do_not_cancel():
    """Deltas of many words sum to zero, as those of an optimiser nearly do."""
    weights = torch.randn(4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    resident = FlatWeights.of({"w": weights})
    seen = {resident.digest}
    for shift in range(1, 50):
        new = weights.clone()
        new.view(torch.int16)[:shift] += 1
        new.view(torch.int16)[-shift:] -= 1
        seen.add(encode(resident, {"w": new}).target)
    assert len(seen) == 50
