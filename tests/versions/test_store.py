import math
import threading
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oldlogits.core.errors import ExactnessError, LayoutError, PatchError, StoreFullError, StoreUseError, VersionEvictedError
from oldlogits.versions import FlatWeights, PatchStore, apply
from tests.versions.states import assert_bits, assert_holds, changed, history, state
from tests.waiting import HUNG_S

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
    with store.walk():
        for version in (5, 4, 6, 3):
            with store.checkout(version) as found:
                assert_bits(found, states[version - 3])
    store.hold(4)
    assert store.retain(6) == [3]
    assert store.release(4) == [4, 5]
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
    assert second.encode_s > 0
    assert (second.log_bytes, second.waited_s) == (0, 0.0)
    assert store.num_bytes == 8000 + store.patch_bytes


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
@pytest.mark.parametrize("walks", [False, True])
def test_the_copy_is_back_at_the_newest_version_after_any_exception(error, walks):
    store = filled(PatchStore(), states := history(["sparse", "dense"]))
    weights = store._copy().flat.weights

    with pytest.raises(error), store.walk() if walks else nullcontext(), store.checkout(0):
        raise error
    assert_bits(weights, states[2])
    store.verify()


def test_a_walk_goes_down_once_and_back_once(monkeypatch):
    store = filled(PatchStore(), states := history(["sparse"] * 5))
    weights = store._copy().flat.weights
    ways, between = [], store._chain.between

    def noting(a, b):
        ways.extend([abs(a - b)] if a != b else [])
        return between(a, b)

    monkeypatch.setattr(store._chain, "between", noting)
    with store.walk():
        for version in (4, 3, 1):
            with store.checkout(version) as found:
                assert_bits(found, states[version])
            assert_bits(weights, states[version])
    assert_bits(weights, states[5])
    assert ways == [1, 1, 2, 4]
    for version in (4, 3, 1):
        with store.checkout(version):
            pass
    assert ways == [1, 1, 2, 4, 1, 1, 2, 2, 4, 4]


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


def test_a_version_is_published_inside_a_walk():
    store = filled(PatchStore(), states := history(["sparse", "dense", "sparse"])[:3])
    with store.walk():
        with store.checkout(0):
            pass
        store.publish(3, states[0])
        with store.checkout(1) as found:
            assert_bits(found, states[1])
    assert_holds(store, dict(enumerate([*states, states[0]])))


def test_what_is_checked_out_goes_when_its_block_ends():
    store = filled(PatchStore(), states := history(["sparse"] * 3))
    with store.checkout(1) as found:
        assert store.retain(3) == [0]
        assert_bits(found, states[1])
    assert store.versions == (3,)
    store.verify()


@given(st.lists(st.tuples(st.sampled_from(["publish", "retain", "hold", "release"]), st.integers(0, 9)), max_size=30))
def test_all_is_there_from_the_oldest_that_is_retained_or_held_to_the_newest(steps):
    store, held, oldest, there = PatchStore(), [], None, {}
    for what, number in steps:
        newest = max(there, default=0)
        if what == "publish":
            version = newest + 1 + number
            there[version] = state(version)
            store.publish(version, there[version])
        elif what == "retain":
            oldest = newest - number
            store.retain(oldest)
        elif what == "hold" and there:
            held.append(sorted(there)[number % len(there)])
            store.hold(held[-1])
        elif what == "release" and held:
            store.release(held.pop(number % len(held)))
        needed = [v for v in there if oldest is None or v >= oldest or v in held or v == max(there)]
        there = {v: there[v] for v in there if v >= min(needed)}
        assert store.versions == tuple(there)
    assert_holds(store, there)


def test_a_version_that_is_gone_is_named_with_the_window_and_the_remedy():
    store = PatchStore()
    with pytest.raises(VersionEvictedError, match="nothing was published yet"), store.checkout(0):
        pass
    filled(store, history(["sparse"] * 3), first=4)
    store.retain(6)
    for refused in (store.hold, store.rewind, store.verify, lambda v: store.checkout(v).__enter__()):
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
    with pytest.raises(StoreUseError, match="released more often"):
        store.release(1)
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
    assert receiver.digest == store._digests[target] == receiver.full_digest()
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
    store = filled(PatchStore(hot=9, budget_bytes=cold, wait_s=0), states)
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


def test_without_room_a_publication_is_refused_and_the_store_is_as_it_was():
    states = large_history(9)
    store = PatchStore(budget_bytes=400, wait_s=0.01)
    with pytest.raises(StoreFullError, match="budget_bytes = 400"):
        filled(store, states)
    held = len(store.versions)
    assert 1 < held < 9
    assert store.patch_bytes <= 400
    assert_holds(store, dict(enumerate(states[:held])))
    store.retain(held - 1)
    store.publish(held, states[held])
    assert_holds(store, {v: states[v] for v in (held - 1, held)})


@pytest.mark.parametrize("how", ["retain", "release"])
def test_a_publication_waits_until_another_thread_needs_less(how, monkeypatch):
    states = large_history(9)
    store = PatchStore(budget_bytes=400, wait_s=60)
    store.publish(0, states[0])
    store.publish(1, states[1])
    store.hold(0)
    if how == "release":
        store.retain(8)
    published, waits, wait_for = [], threading.Event(), store._room.wait_for

    def noting(*arguments):
        waits.set()
        return wait_for(*arguments)

    monkeypatch.setattr(store._room, "wait_for", noting)

    def publish():
        published.extend(store.publish(version, states[version]) for version in range(2, 9))

    thread = threading.Thread(target=publish)
    thread.start()
    assert waits.wait(HUNG_S)
    with store.walk():
        for version in reversed(store.versions):
            with store.checkout(version) as found:
                assert_bits(found, states[version])
    store.release(0)
    if how == "retain":
        for oldest in range(1, 9):
            store.retain(oldest)
            while store.versions[-1] < min(8, oldest + 1):
                pass
    thread.join()
    assert len(published) == 7
    assert any(publication.waited_s > 0 for publication in published)
    assert store.patch_bytes <= 400
    assert store.versions[-1] == 8
    assert_holds(store, {v: states[v] for v in store.versions})


def test_an_interrupt_while_waiting_leaves_the_store_as_it_was(monkeypatch):
    states = large_history(9)
    store = PatchStore(budget_bytes=400, wait_s=60)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(store._room, "wait_for", interrupt)
    with pytest.raises(KeyboardInterrupt):
        filled(store, states)
    assert_holds(store, dict(enumerate(states[: len(store.versions)])))


def test_damage_to_the_copy_is_noticed_with_the_version_named():
    store = filled(PatchStore(), states := large_history(3))
    touched = int((states[1]["w"] != states[2]["w"]).nonzero()[0])
    untouched = int((states[0]["w"] == states[2]["w"]).nonzero()[0])
    store.verify()
    store._copy().flat.weights["w"].view(torch.int16)[untouched] ^= 4
    with pytest.raises(ExactnessError, match="bits of version 2 are not those that were published"):
        store.verify()
    store._copy().flat.weights["w"].view(torch.int16)[untouched] ^= 4
    store._copy().flat.weights["w"].view(torch.int16)[touched] ^= 4
    with pytest.raises(ExactnessError, match="bits of version 1 are not those that were published"), store.checkout(1):
        pass
    store._copy().flat.weights["w"].view(torch.int16)[touched] ^= 4
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


def test_a_thousand_versions_stay_within_the_budget_while_another_thread_reads_the_window():
    window, size = 8, 3000
    g = torch.Generator().manual_seed(0)
    budget = 4000
    store, live, sums = PatchStore(budget_bytes=budget, hot=2), torch.randn(size, generator=g).bfloat16(), {}
    stop, errors, reads = threading.Event(), [], []

    def read():
        while not stop.is_set():
            try:
                with store.walk():
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
