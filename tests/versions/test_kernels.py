"""The streams against a scalar decoder, byte by byte where it matters, and the same from both kernels."""

import importlib
import math
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oldlogits.core.errors import ExactnessError, PatchError
from oldlogits.versions import FlatWeights, Patch, apply, encode, kernels_in_use
from oldlogits.versions.patches import kernel_choice
from oldlogits.versions.patches.layout import WORDS
from oldlogits.versions.patches.streams import BLOCK_SIZE
from tests.versions.kernel_choice import CHOICES, kernels

FLOATS = {1: torch.float8_e4m3fn, 2: torch.bfloat16, 4: torch.float32, 8: torch.float64}
WIDTHS = tuple(WORDS)


def words(width, size, seed, low=None, high=None):
    """Random words; of all bit patterns unless bounded."""
    limit = 1 << 8 * width - 1
    draw = np.random.default_rng(seed).integers(-limit if low is None else low, limit if high is None else high, size, np.int64)
    return torch.from_numpy(draw).to(WORDS[width])


def next_words(old, share, seed, small):
    """Some of the words moved, by at most 100 or to anywhere."""
    width = old.itemsize
    chosen = torch.from_numpy(np.random.default_rng(seed).random(len(old)) < share)
    moved = old + words(width, len(old), seed, -100, 100) if small else words(width, len(old), seed)
    return torch.where(chosen, moved, old)


def patch_of(old, new, choice="numba"):
    """The patch between two runs of words."""
    dtype = FLOATS[old.itemsize]
    with kernels(choice):
        return encode(FlatWeights.of({"w": old.view(dtype)}), {"w": new.view(dtype)})


def decoded(patch, numel):
    """What a patch adds to each element, by a plain reading of the format."""
    width = patch.layout.entries[0].dtype.itemsize
    gaps, values, wide, dense = (iter(stream.tolist()) for stream in patch.streams)

    def word(stream):
        return int.from_bytes(bytes(next(stream) for _ in range(width)), sys.byteorder, signed=True)

    deltas = [0] * numel
    for block in patch.blocks:
        first, count = int(block["first"]), int(block["count"])
        if block["is_dense"]:
            deltas[first : first + count] = [word(dense) for _ in range(count)]
            continue
        place = -1
        for _ in range(int(block["gaps"])):
            gap = next(gaps)
            place += gap if gap == 255 else gap + 1
            if gap != 255:
                value = next(values)
                deltas[first + place] = word(wide) if value == -128 else value
        assert place < count
    assert [next(stream, None) for stream in (gaps, values, wide, dense)] == [None] * 4
    return deltas


@pytest.mark.slow
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("width", WIDTHS)
@given(st.integers(1, 300), st.sampled_from([0, 0.01, 0.1, 0.4, 0.8, 1]), st.integers(0, 99), st.booleans())
def test_the_streams_are_what_the_format_says(choice, width, numel, share, seed, small):
    old = words(width, numel, seed)
    new = next_words(old, share, seed + 100, small)
    modulus = 1 << 8 * width
    found = [delta % modulus for delta in decoded(patch_of(old, new, choice), numel)]
    assert found == [(b - a) % modulus for a, b in zip(old.tolist(), new.tolist(), strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("share", [0, 0.0002, 0.003, 0.02, 0.1, 0.3, 0.6, 1])
@pytest.mark.parametrize("width", WIDTHS)
def test_both_kernels_write_the_same_bytes_and_go_the_same_way(width, share, small):
    sizes = {"long": 3 * BLOCK_SIZE + 777, "block": BLOCK_SIZE, "short": 63, "one": 1}
    dtype = FLOATS[width]
    old = {name: words(width, size, size) for name, size in sizes.items()}
    new = {name: next_words(values, share, len(values) + 1, small) for name, values in old.items()}
    old, new = ({name: values.view(dtype) for name, values in both.items()} for both in (old, new))
    contents, digests = set(), set()
    for choice in CHOICES:
        with kernels(choice):
            flat = FlatWeights.of(old)
            patch = encode(flat, new)
            digests.add((patch.base, patch.target, flat.full_digest()))
            contents.add(patch.to_bytes("memory"))
            apply(flat, [patch], -1)
            digests.add((patch.base, patch.target, patch.target if flat.full_digest() == patch.base else 0))
            for name, values in old.items():
                assert torch.equal(flat.weights[name].view(WORDS[width]), values.view(WORDS[width]))
    assert len(contents) == len(digests) == 1


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize(
    "places, gaps",
    [
        ([0], [0]),
        ([254], [254]),
        ([255], [255, 0]),
        ([256], [255, 1]),
        ([509], [255, 254]),
        ([510], [255, 255, 0]),
        ([0, 1, 256, 512], [0, 0, 254, 255, 0]),
        ([65_535], [255] * 257 + [0]),
    ],
)
def test_gaps_of_255_and_more_take_further_bytes(choice, places, gaps):
    old = torch.zeros(BLOCK_SIZE, dtype=torch.int16)
    new = old.clone()
    new[places] = 1
    patch = patch_of(old, new, choice)
    assert patch.streams.gaps.tolist() == gaps
    assert patch.streams.values.tolist() == [1] * len(places)
    assert patch.blocks[["entry", "is_dense", "first", "count", "gaps", "changes", "wide"]].tolist() == [
        (0, 0, 0, BLOCK_SIZE, len(gaps), len(places), 0)
    ]


@pytest.mark.parametrize("choice", CHOICES)
def test_values_of_more_than_a_byte_go_to_the_wide_stream(choice):
    old = torch.zeros(9000, dtype=torch.int16)
    new = old.clone()
    steps = [127, -127, 128, -128, 300, -32768]
    new[::1500] = torch.tensor(steps, dtype=torch.int16)
    patch = patch_of(old, new, choice)
    assert patch.streams.values.tolist() == [127, -127, -128, -128, -128, -128]
    assert patch.streams.wide.view(torch.int16).tolist() == [128, -128, 300, -32768]


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("changes, dense", [(50, False), (51, True)])
def test_a_block_is_dense_when_the_sparse_form_takes_more_than_half_as_many_bytes(choice, changes, dense):
    """100 values of 2 bytes: 50 changes take 50 gaps and 50 values, which is half."""
    old = torch.zeros(100, dtype=torch.int16)
    new = old.clone()
    new[:changes] = 1
    patch = patch_of(old, new, choice)
    assert bool(patch.blocks["is_dense"][0]) is dense
    assert patch.streams.num_bytes == (200 if dense else 100)


@pytest.mark.parametrize("choice", CHOICES)
def test_blocks_are_cut_at_multiples_of_their_size_and_left_out_when_nothing_changed(choice):
    old = torch.zeros(3 * BLOCK_SIZE + 5, dtype=torch.int16)
    new = old.clone()
    new[[BLOCK_SIZE - 1, 2 * BLOCK_SIZE, 3 * BLOCK_SIZE + 4]] = 1
    blocks = patch_of(old, new, choice).blocks
    assert blocks[["first", "count"]].tolist() == [(0, BLOCK_SIZE), (2 * BLOCK_SIZE, BLOCK_SIZE), (3 * BLOCK_SIZE, 5)]


@pytest.mark.slow
@pytest.mark.parametrize("choice", CHOICES)
@given(st.sampled_from(["gaps", "values", "wide"]), st.integers(0, 5000), st.integers(1, 255), st.sampled_from([1, -1]))
def test_no_damage_of_the_streams_reaches_beyond_the_blocks_and_goes_unnoticed(choice, stream, at, by, direction):
    old = {"a": words(2, 500, 1), "b": words(2, 70_000, 2), "c": words(2, 500, 3)}
    new = old | {"b": next_words(old["b"], 0.02, 4, False)}
    old, new = ({n: v.view(torch.bfloat16) for n, v in both.items()} for both in (old, new))
    with kernels(choice):
        flat = FlatWeights.of(old)
        patch = encode(flat, new)
        if direction > 0:
            apply(flat, [patch], -1)
        buffer = getattr(patch.streams, stream).view(torch.uint8)
        buffer[at % len(buffer)] += by
        with pytest.raises((ExactnessError, PatchError)):
            apply(flat, [patch], direction)
        for name in "ac":
            assert torch.equal(flat.weights[name].view(torch.int16), old[name].view(torch.int16))
        if flat.digest is not None:
            assert flat.full_digest() == flat.digest


def test_streams_that_fill_up_are_emptied_in_between():
    """More changes than the encoder has room for at once."""
    from oldlogits.versions.patches import kernels as numba_kernels

    old = words(2, 5 * BLOCK_SIZE, 0)
    new = next_words(old, 0.4, 1, True)
    with mock.patch.object(numba_kernels, "_ROOM", BLOCK_SIZE):
        several = patch_of(old, new)
    assert several.to_bytes("memory") == patch_of(old, new).to_bytes("memory")


def test_the_kernels_in_use_are_named():
    assert kernels_in_use().startswith("numba on ")


@pytest.fixture
def forgotten():
    """The choice of kernels is made anew, before and after."""
    kernel_choice._numba.cache_clear()
    yield
    kernel_choice._numba.cache_clear()


@pytest.mark.usefixtures("forgotten")
def test_without_numba_everything_works_and_says_that_it_is_slow():
    def missing(name):
        raise ImportError(f"No module named {name!r}")

    with mock.patch.object(importlib, "import_module", missing), kernels("numba"):
        assert kernels_in_use().startswith("torch operations (slow): numba is not available: No module named")
        flat = FlatWeights.of({"w": torch.zeros(3)})
        patch = encode(flat, {"w": torch.tensor([0.0, math.nan, 1.0])})
        apply(flat, [Patch.from_bytes(patch.to_bytes())], -1)
        assert flat.weights["w"].tolist() == [0, 0, 0]


@pytest.mark.usefixtures("forgotten")
def test_with_numba_switched_off_torch_takes_over():
    with mock.patch("oldlogits.versions.patches.intrinsics.config.DISABLE_JIT", True):
        assert "NUMBA_DISABLE_JIT" in kernels_in_use()
        with kernels("numba"):
            assert type(kernel_choice.kernels_for(torch.zeros(3))).__name__ == "TorchKernels"


@pytest.mark.slow
def test_numba_is_started_by_the_first_large_buffer_only():
    code = (
        "import sys, torch; from oldlogits.versions import FlatWeights; FlatWeights.of({'w': torch.zeros(1000)}); "
        "assert 'numba' not in sys.modules; FlatWeights.of({'w': torch.zeros(100_000)}); assert 'numba' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
