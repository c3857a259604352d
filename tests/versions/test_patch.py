"""Patches give back exactly the bits that went in, whatever they are, in both directions, alone, composed and from shards."""

import re
import signal
import struct
import sys
import zlib
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oldlogits.core.errors import ExactnessError, LayoutError, PatchError
from oldlogits.versions import FlatWeights, Layout, Patch, Shard, apply, concatenate, encode
from oldlogits.versions.patches.kernels_torch import TorchKernels
from tests.versions.kernel_choice import CHOICES, kernels
from tests.versions.states import assert_bits, history, state

KINDS = ("none", "sparse", "many", "dense", "special")
histories = st.lists(st.sampled_from(KINDS), min_size=1, max_size=5)
TIERS = ("memory", "cold")


def encoded(states):
    """The resident copy at the last state, and the patches that lead there from the first."""
    flat = FlatWeights.of(states[0])
    return flat, [encode(flat, new) for new in states[1:]]


def assert_at(flat, weights):
    assert_bits(flat.weights, weights)
    assert flat.digest == flat.full_digest()


def changed_share(before, after):
    """Values whose bits differ / values, of tensors of two bytes."""
    return float((before.view(torch.int16) != after.view(torch.int16)).double().mean())


@pytest.mark.slow
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("tier", TIERS)
@given(histories, st.integers(0, 9))
def test_any_history_comes_back_bit_by_bit_in_both_directions(choice, tier, kinds, seed):
    states = history(kinds, seed)
    with kernels(choice):
        flat, patches = encoded(states)
        patches = [Patch.from_bytes(patch.to_bytes(tier), layout=flat.layout) for patch in patches]
        assert_at(flat, states[-1])
        for i in reversed(range(len(patches))):
            assert apply(flat, [patches[i]], -1) == patches[i].base
            assert_at(flat, states[i])
        for i in range(len(patches)):
            assert apply(flat, [patches[i]]) == patches[i].target
            assert_at(flat, states[i + 1])


@pytest.mark.slow
@pytest.mark.parametrize("choice", CHOICES)
@given(histories, st.data())
def test_one_jump_over_many_patches_is_as_many_jumps_over_one(choice, kinds, data):
    states = history(kinds)
    with kernels(choice):
        flat, patches = encoded(states)
        at = len(patches)
        for _ in range(4):
            to = data.draw(st.integers(0, len(patches)))
            apply(flat, patches[min(at, to) : max(at, to)], 1 if to > at else -1)
            at = to
            assert_at(flat, states[at])


@pytest.mark.slow
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_bit_pattern_of_two_bytes_becomes_any_other_and_back(choice, dtype):
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16)
    order = torch.randperm(2**16, generator=torch.Generator().manual_seed(0))
    old, new = patterns.view(dtype), patterns[order].view(dtype)
    with kernels(choice):
        flat = FlatWeights.of({"w": old})
        patch = encode(flat, {"w": new})
        assert_at(flat, {"w": new})
        apply(flat, [patch], -1)
        assert_at(flat, {"w": old})


@pytest.mark.slow
@given(st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)), min_size=1, max_size=30))
def test_all_bit_patterns_of_float32_come_back(pairs):
    old, new = (torch.tensor([p[i] - 2**31 for p in pairs], dtype=torch.int32).view(torch.float32) for i in (0, 1))
    flat, (patch,) = encoded([{"w": old}, {"w": new}])
    assert_at(flat, {"w": new})
    apply(flat, [patch], -1)
    assert_at(flat, {"w": old})


@pytest.mark.slow
@pytest.mark.parametrize("numel", [1, 63, 64, 65, 65_535, 65_536, 65_537, 200_000])
def test_masters_are_cast_as_torch_casts_them(numel):
    masters = torch.randn(numel, generator=torch.Generator().manual_seed(0))
    flat = FlatWeights.of({"w": masters, "small": masters[:5].clone()}, dtype=torch.bfloat16)
    masters += 1e-3
    patch = encode(flat, {"w": masters, "small": masters[:5]})
    assert_at(flat, {"w": masters.bfloat16(), "small": masters[:5].bfloat16()})
    apply(flat, [patch], -1)
    assert flat.digest == patch.base == flat.full_digest()


@pytest.mark.slow
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("size", [1 << 18, (1 << 18) - 1, 200])
def test_masters_of_any_bits_are_cast_as_torch_casts_them(choice, size):
    """Every upper half of a float32 with lower halves around the tie, and any bits at all: NaNs, infinities, subnormals."""
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF]).repeat_interleave(1 << 16)
    ties = (torch.arange(1 << 16).repeat(6) << 16) + lower
    drawn = torch.randint(0, 1 << 32, (1 << 17,), generator=torch.Generator().manual_seed(0))
    bits = torch.cat([ties, drawn])[torch.randperm(len(ties) + len(drawn), generator=torch.Generator().manual_seed(1))]
    masters = (bits[:size] - (1 << 32) * (bits[:size] >= 1 << 31)).to(torch.int32).view(torch.float32)
    zeros = torch.zeros(size, dtype=torch.bfloat16)
    with kernels(choice):
        flat = FlatWeights.of({"w": zeros})
        patch = encode(flat, {"w": masters})
        assert_at(flat, {"w": masters.bfloat16()})
        apply(flat, [patch], -1)
        assert_at(flat, {"w": zeros})


def test_tensors_need_not_be_contiguous_nor_without_gradient():
    before = torch.randn(300, 200, generator=torch.Generator().manual_seed(0)).bfloat16()
    after = (before.float() * 1.01).bfloat16()
    flat = FlatWeights.of({"w": before, "cut": before[:, ::3]})
    new = {"w": after.t().contiguous().t(), "cut": after[:, ::3].requires_grad_()}
    encode(flat, new)
    assert_at(flat, {"w": after, "cut": after[:, ::3]})


@pytest.mark.slow
@pytest.mark.parametrize("choice", CHOICES)
@given(histories, st.lists(st.integers(0, 1500), max_size=5), st.randoms())
def test_patches_of_shards_concatenate_to_one_that_does_what_that_of_the_whole_does(choice, kinds, cuts, random):
    """FSDP: every rank holds an element range of each parameter, some of them none at all."""
    states = history(kinds)
    shards = []
    with kernels(choice):
        whole, patches = encoded(states)
        for a, b in zip([0, *sorted(cuts)], [*sorted(cuts), 1500], strict=True):
            ranges = {n: (min(a, t.numel()), t.numel() if b == 1500 else min(b, t.numel())) for n, t in states[0].items()}
            places = {n: Shard(shape=tuple(states[0][n].shape), start=i, stop=j) for n, (i, j) in ranges.items()}
            parts = [{n: t.reshape(-1)[slice(*ranges[n])].clone() for n, t in s.items() if n != "head"} for s in states]
            local = FlatWeights.of(parts[0], shards=places)
            shards.append([encode(local, part) for part in parts[1:]])
        random.shuffle(shards)
        plain = FlatWeights.of({n: t for n, t in states[-1].items() if n != "head"})
        for i in reversed(range(len(patches))):
            patch = concatenate([shard[i] for shard in shards])
            assert (patch.base, patch.target) == (patches[i].base, patches[i].target)
            assert patch.num_changed == patches[i].num_changed
            apply(plain, [Patch.from_bytes(patch.to_bytes())], -1)
            assert_at(plain, {n: t for n, t in states[i].items() if n != "head"})
        assert whole.digest == patches[-1].target


def test_shards_of_other_sizes_apply_to_a_whole_of_many_blocks():
    """Cuts that are no multiples of a block: blocks of different patches overlap in part."""
    old = torch.randn(300_000, generator=torch.Generator().manual_seed(0)).bfloat16()
    new = (old.float() * 1.001).bfloat16()
    newer = (old.float() * 1.002).bfloat16()

    def patch_of(before, after, cuts):
        parts = []
        for a, b in zip([0, *cuts], [*cuts, len(old)], strict=True):
            shard = FlatWeights.of({"w": before[a:b]}, shards={"w": Shard(shape=(len(old),), start=a, stop=b)})
            parts.append(encode(shard, {"w": after[a:b]}))
        return concatenate(parts)

    patches = [patch_of(old, new, [1000, 70_001]), patch_of(new, newer, [65_536, 131_071])]
    for choice in CHOICES:
        with kernels(choice):
            flat = FlatWeights.of({"w": old})
            apply(flat, patches)
            assert_at(flat, {"w": newer})
            apply(flat, patches, -1)
            assert_at(flat, {"w": old})


def test_a_patch_says_what_changed():
    before = {"w": torch.zeros(2000, dtype=torch.bfloat16), "v": torch.zeros(50), "frozen": torch.ones(10**6)}
    flat = FlatWeights.of(before, frozen=["frozen"])
    after = {"w": before["w"].clone(), "v": torch.arange(1.0, 51)}
    after["w"][[3, 1500]] = 1
    patch = encode(flat, after)
    assert (patch.num_changed, patch.share_changed) == (52, 52 / 2050)
    # w: gaps 3 | 255 * 5 + 221, two values that are -128, two wide words of 2 bytes; v: 50 whole words of 4 bytes
    assert patch.streams.num_bytes == (1 + 6) + 2 + 2 * 2 + 50 * 4
    assert patch.num_bytes == patch.streams.num_bytes + 2 * 32


def test_nothing_changed_is_an_empty_patch():
    flat, (patch,) = encoded([state(), state()])
    assert (patch.num_changed, patch.num_bytes, patch.base) == (0, 0, patch.target)
    assert apply(flat, [Patch.from_bytes(patch.to_bytes())]) == flat.full_digest()
    assert apply(flat, []) == flat.digest


def test_a_patch_is_far_smaller_than_a_copy_where_little_changes():
    old = (torch.randn(1 << 21, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    new = (old.float() + 1e-6 * torch.randn(1 << 21, generator=torch.Generator().manual_seed(1))).bfloat16()
    share = changed_share(old, new)
    _, (patch,) = encoded([{"w": old}, {"w": new}])
    assert 0.005 < share == patch.share_changed < 0.02
    assert patch.num_bytes / old.nbytes < 1.12 * share
    assert len(patch.to_bytes("cold")) / old.nbytes < 0.75 * share


def small_patch():
    states = history(["sparse", "many"])
    return states, *encoded(states)


@pytest.mark.parametrize("tier", TIERS)
def test_every_byte_of_a_patch_that_is_damaged_is_noticed(tier):
    _, _, patches = small_patch()
    content = patches[0].to_bytes(tier)
    for at in range(len(content)):
        for bit in (0, 7):
            damaged = bytearray(content)
            damaged[at] ^= 1 << bit
            with pytest.raises(PatchError):
                Patch.from_bytes(damaged)


@pytest.mark.parametrize("tier", TIERS)
def test_a_patch_that_ends_early_or_late_is_refused(tier):
    _, _, patches = small_patch()
    content = patches[0].to_bytes(tier)
    for end in range(len(content)):
        with pytest.raises(PatchError):
            Patch.from_bytes(content[:end])
    with pytest.raises(PatchError, match="another checksum"):
        Patch.from_bytes(content + b"x")


@pytest.mark.parametrize(
    "at, value, words",
    [
        (0, b"X", "no patch"),
        (8, b"\x07\x00", "format 7.*format 2"),
        (10, b"\x02\x00", "byte order 2"),
        (30, b"~", "another checksum"),
    ],
)
def test_what_cannot_be_read_is_told(at, value, words):
    content = bytearray(small_patch()[2][0].to_bytes())
    content[at : at + len(value)] = value
    with pytest.raises(PatchError, match=words):
        Patch.from_bytes(content)


@pytest.mark.parametrize(
    "column, value, words",
    [
        ("entry", 99, "entries"),
        ("entry", 4, "entries"),
        ("first", 1 << 40, "outside"),
        ("count", 1 << 30, "outside"),
        ("changes", 60_000, "more changes"),
        ("gaps", 2, "more changes"),
        ("wide", 9, "what the header or the table of blocks says"),
        ("is_dense", 1, "what the header or the table of blocks says"),
    ],
)
def test_a_table_that_contradicts_the_layout_or_the_streams_is_refused_though_its_checksum_holds(column, value, words):
    patch = small_patch()[2][0]
    blocks = patch.blocks.copy()
    blocks[column][0] = value
    wrong = Patch(layout=patch.layout, base=patch.base, target=patch.target, blocks=blocks, streams=patch.streams)
    with mock.patch("oldlogits.versions.patches.patch._runs", lambda layout, blocks: [[], [(blocks.nbytes, 32)], *[[]] * 4]):
        content = wrong.to_bytes("memory")
    with pytest.raises(PatchError, match=words):
        Patch.from_bytes(content)


def test_a_patch_of_other_tensors_is_refused_by_name():
    flat, (patch,) = encoded([state(), state(1)])
    other = FlatWeights.of({name: tensor for name, tensor in state().items() if name != "norm"})
    with pytest.raises(LayoutError, match="norm is unknown here"):
        apply(other, [patch])
    with pytest.raises(LayoutError, match="norm is unknown here"):
        Patch.from_bytes(patch.to_bytes(), layout=other.layout)
    assert_at(other, {name: tensor for name, tensor in state().items() if name != "norm"})
    assert Patch.from_bytes(patch.to_bytes(), layout=flat.layout).layout == Layout.of(state())


def test_patches_that_do_not_lead_on_from_where_the_copy_is_are_refused():
    states, flat, (first, second) = small_patch()
    for patches, direction in (([first], -1), ([second], 1), ([second, first], -1), ([first, second], 1), ([first, first], -1)):
        with pytest.raises(ExactnessError, match="do not lead on"):
            apply(flat, patches, direction)
        assert_at(flat, states[-1])


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("stream", ["gaps", "values", "wide", "dense"])
def test_a_patch_damaged_in_memory_is_noticed_and_undone(choice, stream):
    with kernels(choice):
        states = [state(), state(3)]
        before = states[0] | {"sparse": torch.zeros(90_000, dtype=torch.bfloat16)}
        after = states[1] | {"sparse": before["sparse"].clone()}
        after["sparse"].view(torch.int16)[torch.arange(0, 90_000, 700)] += torch.arange(129).to(torch.int16) * 40 + 1
        flat, (patch,) = encoded([before, after])
        getattr(patch.streams, stream)[1] += 1
        with pytest.raises((ExactnessError, PatchError)):
            apply(flat, [patch], -1)
        if flat.digest is not None:
            assert_at(flat, after)


@pytest.mark.parametrize("choice", CHOICES)
def test_a_corrupted_word_that_a_patch_changes_is_noticed(choice):
    with kernels(choice):
        old, new = torch.arange(100.0), torch.arange(1.0, 101)
        flat, (patch,) = encoded([{"w": old}, {"w": new}])
        flat.weights["w"].view(torch.int32)[50] ^= 1 << 20
        with pytest.raises(ExactnessError, match="not those that went in"):
            apply(flat, [patch], -1)
        assert flat.digest == patch.target != flat.full_digest()


def test_what_breaks_off_while_encoding_is_undone():
    old = {"a": torch.zeros(100_000), "b": torch.zeros(100_000), "c": torch.zeros(7, dtype=torch.int64)}
    flat = FlatWeights.of(old)
    broken = {name: tensor + 1 for name, tensor in old.items()} | {"b": torch.ones(100_000, device="meta")}
    with pytest.raises(NotImplementedError, match="meta"):
        encode(flat, broken)
    assert_at(flat, old)


@pytest.mark.parametrize("step", ["encode", "apply"])
def test_ctrl_c_waits_until_the_weights_are_whole(step):
    states, flat, patches = small_patch()

    class Interrupted(TorchKernels):
        def encoder(self, words, grid):
            signal.raise_signal(signal.SIGINT)
            return super().encoder(words, grid)

        def apply(self, words, parts, direction):
            signal.raise_signal(signal.SIGINT)
            return super().apply(words, parts, direction)

    interrupted = mock.patch("oldlogits.versions.patches.codec.kernels_for", return_value=Interrupted())
    with interrupted, pytest.raises(KeyboardInterrupt):
        encode(flat, states[0]) if step == "encode" else apply(flat, patches, -1)
    assert_at(flat, states[0])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def with_checksum(header):
    """A prefix whose checksum is right, without the header."""
    return struct.pack("<8sHHII", b"oldpatch", 2, {"little": 1, "big": 2}[sys.byteorder], len(header), zlib.crc32(header))


NO_SECTIONS = b'{"tier":"cold","base":1,"target":2,"sizes":[]}'


@given(st.binary(max_size=60) | st.sampled_from([b"1", b"[]", b"{}", NO_SECTIONS]))
def test_no_bytes_but_a_patch_are_a_patch(content):
    for start in (b"", b"oldpatch", with_checksum(content)):
        with pytest.raises(PatchError):
            Patch.from_bytes(start + content)


def test_errors_say_what_to_do():
    with pytest.raises(PatchError) as caught:
        Patch.from_bytes(b"")
    assert re.search(r"got: .*; allowed: .*; fix: ", str(caught.value))
