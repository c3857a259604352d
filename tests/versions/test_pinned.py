"""A version that is pinned stays, bit for bit, while those between it and what is needed go; patches that follow make one."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oldlogits.core.errors import PatchError, VersionEvictedError
from oldlogits.versions import FlatWeights, Patch, PatchStore, apply, encode
from oldlogits.versions.patches.compose import compose
from tests.versions.kernel_choice import CHOICES, kernels
from tests.versions.states import assert_bits, assert_holds, history

from .test_store import filled

KINDS = ("none", "sparse", "many", "dense", "special")
FEW = [list(kinds) for kinds in itertools.product(KINDS, repeat=2)]


def patches_of(states):
    flat = FlatWeights.of(states[0])
    return flat, [encode(flat, new) for new in states[1:]]


@pytest.mark.parametrize("kinds", FEW, ids="-".join)
def test_two_patches_make_the_one_that_is_encoded_from_the_first_state_to_the_last(kinds):
    """To the last byte: the streams are those of the direct way, whichever blocks were sparse or dense before."""
    states = history(kinds)
    _, patches = patches_of(states)
    _, (direct,) = patches_of([states[0], states[-1]])
    joined = compose(patches)
    assert joined.to_bytes("memory") == direct.to_bytes("memory")
    assert (joined.base, joined.target) == (patches[0].base, patches[1].target)


@pytest.mark.slow
@pytest.mark.parametrize("choice", CHOICES)
@given(st.lists(st.sampled_from(KINDS), min_size=1, max_size=6), st.integers(0, 9))
def test_any_number_of_patches_make_one_that_leads_there_and_back(choice, kinds, seed):
    states = history(kinds, seed)
    with kernels(choice):
        flat, patches = patches_of(states)
        joined = Patch.from_bytes(compose(patches).to_bytes("cold"), layout=flat.layout)
        apply(flat, [joined], -1)
        assert_bits(flat.weights, states[0])
        apply(flat, [joined], 1)
        assert_bits(flat.weights, states[-1])


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("numel", [1, 65_536, 65_537, 200_001])
def test_blocks_of_large_tensors_are_summed_apart(choice, numel, monkeypatch):
    """Some blocks are in one of the patches only, some in both, and some come back to what they were."""
    monkeypatch.setattr("oldlogits.versions.patches.compose._SCRATCH", 100_000)
    g = torch.Generator().manual_seed(numel)
    first = {"a": torch.randn(numel, generator=g).bfloat16(), "b": torch.randn(3, 70_000, generator=g)}
    second = {"a": first["a"].clone(), "b": first["b"].clone()}
    second["a"][: numel // 3 + 1] += 1
    second["b"][0, ::7] += 1
    third = {"a": first["a"].clone(), "b": second["b"].clone()}
    third["a"][-1] += 2
    third["b"][2] *= 1.5
    with kernels(choice):
        _, patches = patches_of([first, second, third])
        _, (direct,) = patches_of([first, third])
        assert compose(patches).to_bytes("memory") == direct.to_bytes("memory")


def test_a_difference_that_is_taken_back_leaves_nothing():
    states = history(["many"])
    _, patches = patches_of([states[0], states[1], states[0]])
    joined = compose(patches)
    assert joined.num_changed == 0
    assert joined.base == joined.target


def test_patches_that_do_not_follow_one_another_are_refused():
    _, patches = patches_of(history(["sparse", "many", "dense"]))
    with pytest.raises(PatchError):
        compose([patches[0], patches[2]])
    with pytest.raises(PatchError):
        compose(patches[::-1])


@pytest.mark.parametrize("hot", [0, 2, 9])
def test_a_pinned_version_stays_and_those_between_go(hot):
    states = history(["sparse", "dense", "special", "many", "none", "sparse", "dense"])
    store = PatchStore(hot=hot)
    for version, state in enumerate(states):
        store.publish(version, state)
        store.retain(max(0, version - 1), pinned=0)
        there = sorted({0, max(0, version - 1), version})
        assert_holds(store, {at: states[at] for at in there})
    with pytest.raises(VersionEvictedError), store.checkout(3):
        pass
    store.verify()
    assert store.patch_between(6, 7) is not None


def test_a_pinned_version_takes_at_most_a_full_copy_however_many_versions_have_passed():
    store, states = PatchStore(hot=99), history(["dense"] * 30)
    for version, state in enumerate(states):
        store.publish(version, state)
        store.retain(version, pinned=0)
    blocks = 8 * 32  # the table of blocks, one for each tensor
    assert store.patch_bytes <= store.num_bytes - store.patch_bytes + blocks
    assert_holds(store, {0: states[0], 30: states[30]})


def test_the_pin_moves_on_to_a_version_that_is_there_and_the_older_one_goes():
    states = history(["sparse", "dense", "special", "many", "none", "sparse"])
    store = PatchStore()
    for version, state in enumerate(states):
        store.publish(version, state)
        store.retain(version, pinned=version // 2 * 2)
        assert store.versions == tuple(sorted({version // 2 * 2, version}))
    assert store.retain(6) == []
    assert_holds(store, {6: states[6]})


@pytest.mark.parametrize("at", [0, 2, 3])
def test_what_is_checked_out_while_versions_go_is_left_as_it_is(at):
    states = history(["sparse", "dense", "special", "many"])
    store = filled(PatchStore(), states)
    with store.checkout(at) as found:
        store.retain(4, pinned=0)
        assert_bits(found, states[at])
    assert_holds(store, {0: states[0], 4: states[4]})


def test_a_pin_that_is_gone_or_newer_than_what_is_needed_changes_nothing():
    states = history(["sparse", "dense", "special", "many"])
    store = filled(PatchStore(), states)
    assert store.retain(2) == [0, 1]
    assert store.retain(2, pinned=1) == []
    assert store.retain(3, pinned=4) == [2]
    assert_holds(store, {3: states[3], 4: states[4]})


def test_a_store_that_takes_over_a_pinned_version_gives_its_bits():
    """As a run that goes on from a checkpoint: one patch leads from the pinned version to the window."""
    states = history(["sparse", "dense", "special", "many", "none"])
    store = filled(PatchStore(), states)
    store.retain(4, pinned=1)
    other = PatchStore()
    other.publish(5, states[5])
    other.take_over(store.older())
    assert_holds(other, {1: states[1], 4: states[4], 5: states[5]})


@pytest.mark.parametrize("budget_bytes", [None, 1])
def test_with_a_folder_the_versions_after_the_pin_stay_too(budget_bytes, tmp_path):
    states = history(["sparse", "dense", "special", "many"])
    with PatchStore(tmp_path / "v", budget_bytes=budget_bytes) as store:
        filled(store, states)
        assert store.retain(3, pinned=1) == [0]
        assert_holds(store, dict(enumerate(states[1:], 1)))
