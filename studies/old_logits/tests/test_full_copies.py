import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oldlogits.core.errors import StoreUseError, VersionEvictedError
from studies.old_logits.measure.full_copies import FullCopyStore


def weights(value):
    return {"a": torch.full((2, 3), float(value)), "b": torch.full((4,), -float(value), dtype=torch.bfloat16)}


def test_a_published_copy_does_not_change_when_the_live_weights_do():
    store, live = FullCopyStore(), weights(1)
    store.publish(0, live)
    for tensor in live.values():
        tensor.add_(10)
    store.publish(1, live)
    with store.checkout(0) as old, store.checkout(1) as new:
        assert torch.equal(old["a"], weights(1)["a"])
        assert torch.equal(old["b"], weights(1)["b"])
        assert torch.equal(new["a"], torch.full((2, 3), 11.0))


def test_copies_keep_names_dtypes_and_bits_and_need_no_gradient():
    store = FullCopyStore()
    live = {"x": torch.tensor([float("nan"), -0.0, 1e-45], requires_grad=True)}
    store.publish(3, live)
    with store.checkout(3) as held:
        assert held["x"].view(torch.int32).tolist() == live["x"].detach().view(torch.int32).tolist()
        assert not held["x"].requires_grad


def test_bytes_are_those_of_all_copies():
    store = FullCopyStore()
    assert store.num_bytes == 0
    for version in range(3):
        store.publish(version, weights(version))
    assert store.num_bytes == 3 * (6 * 4 + 4 * 2)
    store.retain(2)
    assert store.num_bytes == 6 * 4 + 4 * 2


@given(st.sets(st.integers(0, 20), min_size=1), st.lists(st.integers(0, 25), max_size=4))
def test_retain_drops_all_that_is_older_than_needed_but_never_the_newest_nor_what_is_needed(published, needed):
    store = FullCopyStore()
    for version in sorted(published):
        store.publish(version, weights(version))
    held = set(published)
    for oldest in needed:
        kept = {v for v in held if v >= oldest or v == max(held)}
        assert store.retain(oldest) == sorted(held - kept)
        held = kept
        assert store.versions == tuple(sorted(held))
    for version in published:
        if version in held:
            with store.checkout(version) as found:
                assert found["a"][0, 0] == version
        else:
            with pytest.raises(VersionEvictedError), store.checkout(version):
                pass


def test_a_version_that_is_gone_is_named_with_the_window_and_the_remedy():
    store = FullCopyStore()
    for version in (4, 5, 6):
        store.publish(version, weights(version))
    store.retain(5)
    with pytest.raises(VersionEvictedError) as caught, store.checkout(4):
        pass
    assert caught.value.got == "version 4"
    assert caught.value.allowed == "5..6"
    assert "retain" in caught.value.fix


def test_an_empty_store_says_that_nothing_was_published_and_retains_nothing():
    store = FullCopyStore()
    assert store.retain(3) == []
    with pytest.raises(VersionEvictedError, match="nothing was published yet"), store.checkout(0):
        pass


def test_what_is_not_there_is_not_rewound_to_and_versions_ascend():
    store = FullCopyStore()
    for version in (4, 5, 8):
        store.publish(version, weights(version))
    with pytest.raises(VersionEvictedError) as caught:
        store.rewind(6)
    assert caught.value.allowed == "4..5, 8"
    with pytest.raises(StoreUseError, match="version 7 cannot follow version 8"):
        store.publish(7, weights(7))
    with pytest.raises(StoreUseError, match="version 8 was published already, with other bits"):
        store.publish(8, weights(7))
    store.publish(8, weights(8))
    store.rewind(5)
    store.publish(6, weights(60))
    with store.checkout(6) as found:
        assert found["a"][0, 0] == 60
    assert store.versions == (4, 5, 6)


def test_it_serves_the_calls_of_a_store_of_patches():
    store = FullCopyStore()
    for version in range(3, 7):
        store.publish(version, weights(version))
    for version in (5, 4, 6, 3):
        with store.checkout(version) as found:
            assert torch.equal(found["a"], weights(version)["a"])
    assert store.retain(6) == [3, 4, 5]
    assert store.versions == (6,)
    assert store.publish(7, weights(7)).full_bytes == 6 * 4 + 4 * 2
    store.rewind(6)
    assert store.versions == (6,)
    assert store.num_bytes > 0
