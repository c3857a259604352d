import math
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oldlogits.core.errors import ExactnessError, LayoutError, PatchError, StoreUseError, VersionEvictedError
from oldlogits.versions import FlatWeights, PatchStore, apply
from tests.versions.states import assert_bits, assert_holds, changed, history, state

kinds = st.lists(st.sampled_from(["none", "sparse", "many", "dense", "special"]), min_size=1, max_size=5)


def filled(store, states, first=0):
    for version, weights in enumerate(states, start=first):
        store.publish(version, weights)
    return store


def large_history(num, *, size=4000, num_changed=40):
    """States of one bfloat16 tensor of which a few values change: patches are much smaller than it."""
    g = torch.Generator().manual_seed(0)
    states = [{"w": torch.randn(size, generator=g).bfloat16()}]
    for _ in range(num - 1):
        new = states[-1]["w"].clone()
        new.view(torch.int16)[torch.randint(size, (num_changed,), generator=g)] += 1
        states.append({"w": new})
    return states


@pytest.mark.slow
@settings(max_examples=40)
@given(kinds, st.lists(st.integers(1, 5), min_size=6, max_size=6), st.integers(0, 3), st.randoms())
def test_every_version_gives_back_the_published_bits_in_any_order(kinds, gaps, hot, random):
    store, states, version = PatchStore(hot=hot), {}, 0
    for weights, gap in zip(history(kinds), gaps, strict=False):
        version += gap
        store.publish(version, weights)
        states[version] = weights
    order = [*states, *states]
    random.shuffle(order)
    for version in order:
        with store.checkout(version) as found:
            assert_bits(found, states[version])
        with store.checkout(max(states)) as newest:
            assert_bits(newest, states[max(states)])
    store.verify()


def test_what_is_held_or_needed_stays():
    store = PatchStore()
    states = history(["sparse", "dense", "sparse"])
    filled(store, states, first=3)
    for version in (5, 4, 6, 3):
        with store.checkout(version) as found:
            assert_bits(found, states[version - 3])
    assert store.retain(4) == [3]
    assert store.retain(6) == [4, 5]
    assert store.versions == (6,)
    assert store.publish(7, states[0]).full_bytes >= 60 * 2
    store.rewind(6)
    assert store.versions == (6,)
    assert store.num_bytes > 0


def test_float32_masters_are_kept_in_the_dtype_of_the_forward_weights():
    g = torch.Generator().manual_seed(0)
    masters = {"w": torch.randn(70, 3, generator=g), "steps": torch.tensor(3)}
    store = PatchStore(dtype=torch.bfloat16)
    for version in range(3):
        store.publish(version, masters)
        masters["w"] += 1e-3 * torch.randn(70, 3, generator=g)
        if not version:
            expected = masters["w"].clone()
    with store.checkout(1) as found:
        assert_bits(found, {"w": expected.bfloat16(), "steps": torch.tensor(3)})


def test_frozen_tensors_are_held_by_reference_and_cost_nothing():
    base, states = torch.randn(1000), large_history(3)
    store = PatchStore(frozen=["base"])
    for version, weights in enumerate(states):
        store.publish(version, weights | {"base": base})
    assert store.num_bytes - store.patch_bytes == 8000
    with store.checkout(0) as found:
        assert found["base"].data_ptr() == base.data_ptr()
        assert_bits(found, states[0] | {"base": base})


def test_a_publication_says_what_it_cost():
    states = large_history(3)
    store = PatchStore()
    first = store.publish(0, states[0])
    assert (first.version, first.stored_bytes, first.full_bytes, first.share_changed) == (0, 8000, 8000, 1.0)
    second = store.publish(4, states[1])
    num_changed = int((states[1]["w"] != states[0]["w"]).sum())
    assert second.share_changed == num_changed / 4000
    assert second.stored_bytes == store.patch_bytes
    assert 2 * num_changed <= second.stored_bytes <= 2 * num_changed + 200
    assert store.num_bytes == 8000 + store.patch_bytes


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
def test_the_store_goes_on_after_any_exception_in_a_checkout(error):
    store = filled(PatchStore(), states := history(["sparse", "dense"]))
    with pytest.raises(error), store.checkout(0):
        raise error
    store.verify()
    store.publish(3, states[0])
    assert_holds(store, dict(enumerate([*states, states[0]])))


def test_a_checkout_leaves_the_copy_where_it_is_and_the_next_call_takes_it_on(monkeypatch):
    store = filled(PatchStore(), states := history(["sparse"] * 5))
    weights, ways, between = store._chain.flat.weights, [], store._chain.between

    def noting(a, b):
        ways.extend([abs(a - b)] if a != b else [])
        return between(a, b)

    monkeypatch.setattr(store._chain, "between", noting)
    for version in (4, 3, 1):
        with store.checkout(version) as found:
            assert_bits(found, states[version])
        assert_bits(weights, states[version])
    store.publish(6, states[5])
    assert ways == [1, 1, 2, 4]


def test_one_version_at_a_time_is_checked_out_in_a_thread():
    store = filled(PatchStore(), states := history(["sparse", "dense"]))
    with store.checkout(1) as outer:
        with store.checkout(1) as inner:
            assert_bits(inner, states[1])
        assert_bits(outer, states[1])
        with pytest.raises(StoreUseError, match="version 2 cannot be checked out while version 1 is"), store.checkout(2):
            pass
        for refused in (lambda: store.publish(3, states[0]), lambda: store.rewind(1)):
            with pytest.raises(StoreUseError, match="inside a checkout"):
                refused()
        assert_bits(outer, states[1])
    assert_holds(store, dict(enumerate(states)))


def test_a_version_is_published_between_checkouts():
    store = filled(PatchStore(), states := history(["sparse", "dense", "sparse"])[:3])
    with store.checkout(0):
        pass
    store.publish(3, states[0])
    with store.checkout(1) as found:
        assert_bits(found, states[1])
    assert_holds(store, dict(enumerate([*states, states[0]])))


def test_what_is_retained_inside_a_checkout_goes_when_its_block_ends():
    store = filled(PatchStore(), states := history(["sparse"] * 3))
    with store.checkout(1) as found:
        assert store.retain(3) == []
        assert_bits(found, states[1])
    assert store.versions == (3,)
    store.verify()


@pytest.mark.slow
@given(st.lists(st.tuples(st.sampled_from(["publish", "retain", "check out"]), st.integers(0, 9)), max_size=30))
def test_all_is_there_from_the_oldest_that_is_retained_to_the_newest(steps):
    store, oldest, there = PatchStore(), 0, {}
    for what, number in steps:
        newest, before = max(there, default=0), set(there)
        if what == "publish":
            version = newest + 1 + number
            there[version] = state(version)
            store.publish(version, there[version])
        elif what == "check out" and there:
            with store.checkout(sorted(there)[number % len(there)]):
                pass
        elif what == "retain":
            oldest = newest - number
            dropped = store.retain(oldest)
        there = {v: there[v] for v in there if v >= oldest or v == max(there)}
        assert store.versions == tuple(there)
        assert what != "retain" or dropped == sorted(before - set(there))
    assert_holds(store, there)


def test_a_version_that_is_gone_is_named_with_the_window_and_the_remedy():
    store = PatchStore()
    with pytest.raises(VersionEvictedError, match="nothing was published yet"), store.checkout(0):
        pass
    filled(store, history(["sparse"] * 3), first=4)
    store.retain(6)
    for refused in (store.rewind, store.verify, lambda v: store.checkout(v).__enter__()):
        with pytest.raises(VersionEvictedError) as caught:
            refused(4)
        assert (caught.value.got, caught.value.allowed) == ("version 4", "6..7")
        assert "retain" in caught.value.fix


def test_versions_ascend_and_one_that_is_published_twice_has_the_same_bits():
    store = filled(PatchStore(), states := history(["sparse", "dense"]))
    assert store.publish(2, states[2]).share_changed == 0
    with pytest.raises(StoreUseError, match="version 2 was published already, with other bits"):
        store.publish(2, states[1])
    with pytest.raises(StoreUseError, match="version 1 cannot follow version 2"):
        store.publish(1, states[1])
    assert_holds(store, dict(enumerate(states)))


def test_weights_that_do_not_fit_leave_the_store_as_it_was():
    store = filled(PatchStore(), states := history(["sparse"]))
    for wrong in ({**states[0], "more": torch.zeros(3)}, {**states[0], "norm": torch.zeros(8)}, {"norm": torch.zeros(7)}):
        with pytest.raises(LayoutError):
            store.publish(2, wrong)
    assert_holds(store, dict(enumerate(states)))
    store.publish(2, states[0])
    assert_holds(store, dict(enumerate([*states, states[0]])))


def test_rewinding_forgets_what_is_newer():
    store = filled(PatchStore(), states := history(["sparse", "dense", "special", "sparse"]))
    store.rewind(2)
    assert_holds(store, dict(enumerate(states[:3])))
    other = changed(states[2], 77, "sparse")
    store.publish(3, other)
    assert_holds(store, dict(enumerate([*states[:3], other])))


@pytest.mark.slow
@settings(max_examples=40)
@given(kinds, st.integers(0, 5), st.integers(0, 5), st.integers(0, 2))
def test_patches_lead_a_receiver_from_any_version_to_any_later_one(kinds, base, target, hot):
    store = filled(PatchStore(hot=hot), states := history(kinds))
    patches = store.patch_between(base, target)
    if not base <= target < len(states):
        assert patches is None
        return
    receiver = FlatWeights.of(states[base])
    assert len(patches) == target - base
    apply(receiver, patches)
    assert_bits(receiver.weights, states[target])
    assert receiver.digest == store._chain.digests[target] == receiver.full_digest()
    store.retain(base + 1)
    assert base == len(states) - 1 or store.patch_between(base, target) is None


def test_the_newest_patches_stay_raw_and_older_ones_are_compressed():
    states = large_history(8, num_changed=1500)
    raw = filled(PatchStore(hot=99), states).patch_bytes
    store = filled(PatchStore(hot=2), states)
    assert [link.raw is not None for link in store._chain.links] == [False] * 5 + [True] * 2
    assert store.patch_bytes < raw
    assert_holds(store, dict(enumerate(states)))


def test_over_the_budget_all_is_compressed_before_anything_else(tmp_path):
    states = large_history(4, num_changed=1500)
    cold = filled(PatchStore(hot=0), states).patch_bytes
    store = filled(PatchStore(hot=9, budget_bytes=cold), states)
    assert store.patch_bytes == cold < filled(PatchStore(hot=9), states).patch_bytes
    assert_holds(store, dict(enumerate(states)))


def test_with_a_folder_the_oldest_go_to_disk_until_the_budget_is_kept(tmp_path):
    states = large_history(9)
    with PatchStore(tmp_path, budget_bytes=700, hot=1) as store:
        for version, weights in enumerate(states):
            store.publish(version, weights)
            assert store.patch_bytes <= 700
        in_memory = [link.num_bytes > 0 for link in store._chain.links]
        assert in_memory == sorted(in_memory)
        assert 0 < sum(in_memory) < 8
        assert_holds(store, dict(enumerate(states)))


def test_damage_to_the_copy_is_noticed_with_the_version_named():
    store = filled(PatchStore(), states := large_history(3))
    touched = int((states[1]["w"] != states[2]["w"]).nonzero()[0])
    untouched = int((states[0]["w"] == states[2]["w"]).nonzero()[0])
    store.verify()
    store._chain.flat.weights["w"].view(torch.int16)[untouched] ^= 4
    with pytest.raises(ExactnessError, match="bits of version 2 are not those that were published"):
        store.verify()
    store._chain.flat.weights["w"].view(torch.int16)[untouched] ^= 4
    store._chain.flat.weights["w"].view(torch.int16)[touched] ^= 4
    with pytest.raises(ExactnessError, match="bits of version 1 are not those that were published"), store.checkout(1):
        pass
    store._chain.flat.weights["w"].view(torch.int16)[touched] ^= 4
    assert_holds(store, dict(enumerate(states)))


def test_a_damaged_patch_in_memory_never_gives_wrong_bits():
    store = filled(PatchStore(hot=1), states := large_history(3, num_changed=1500))
    cold, raw = store._chain.links
    raw.raw.streams.values[3] ^= 1
    with pytest.raises(ExactnessError, match="bits of version 1 "), store.checkout(1):
        pass
    raw.raw.streams.values[3] ^= 1
    whole, unnoticed = cold.cold, []
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        cold.cold = bytes(damaged)
        try:
            with store.checkout(0) as found:
                assert_bits(found, states[0])
                unnoticed.append(position)
        except (PatchError, ExactnessError, LayoutError):
            pass
        with store.checkout(1) as found:
            assert_bits(found, states[1])
    assert len(unnoticed) <= 1, "bytes that mean nothing"
    cold.cold = whole
    assert_holds(store, dict(enumerate(states)))


@pytest.mark.slow
def test_a_thousand_versions_stay_within_the_budget_while_another_thread_reads_the_window():
    window, size = 8, 3000
    g = torch.Generator().manual_seed(0)
    budget = 4000
    store, live, sums = PatchStore(budget_bytes=budget, hot=2), torch.randn(size, generator=g).bfloat16(), {}
    stop, errors, reads = threading.Event(), [], []

    def read():
        while not stop.is_set():
            try:
                for version in reversed(store.versions):
                    with store.checkout(version) as found:
                        total = int(found["w"].view(torch.int16).long().sum())
                        if total != sums[version] or store.patch_bytes > budget:
                            errors.append(version)
                        reads.append(version)
            except VersionEvictedError:
                continue

    reader = threading.Thread(target=read)
    reader.start()
    for version in range(1000):
        live.view(torch.int16)[torch.randint(size, (60,), generator=g)] += 1
        sums[version] = int(live.view(torch.int16).long().sum())
        store.publish(version, {"w": live})
        store.retain(version - window + 1)
        assert store.patch_bytes <= budget
        assert len(store.versions) <= window + 1
    stop.set()
    reader.join()
    assert not errors
    assert reads
    assert store.versions == tuple(range(992, 1000))
    assert math.isclose(store.patch_bytes, budget, rel_tol=0.9)
    store.verify()


def test_older_versions_of_a_store_are_taken_over_by_another_that_holds_its_newest():
    states = history(["sparse", "dense", "none", "special"])
    store, other = filled(PatchStore(hot=1), states, first=3), PatchStore()
    older = store.older()
    assert list(older) == [(3, 4), (4, 5), (5, 6), (6, 7)]
    other.publish(7, states[-1])
    with pytest.raises(PatchError, match="does not lead to version 7"):
        other.take_over({ends: content for ends, content in older.items() if ends != (6, 7)})
    assert other.versions == (7,)
    other.take_over(older)
    other.publish(8, states[0])
    for version, weights in zip((*range(3, 8), 8), (*states, states[0]), strict=True):
        with other.checkout(version) as found:
            assert_bits(found, weights)
    other.verify()
