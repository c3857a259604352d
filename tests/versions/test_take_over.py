"""A store takes over the versions before its first one, as patches that another store of the same versions gave."""

import pytest

from oldlogits.core.errors import PatchError, VersionEvictedError
from oldlogits.versions import PatchStore
from tests.versions.states import assert_bits, history

from .test_store import filled

KINDS = ["sparse", "dense", "special", "many", "none", "sparse"]


def given_away(states, *, hot=4):
    return filled(PatchStore(hot=hot), states).older()


@pytest.mark.slow
@pytest.mark.parametrize("hot", [0, 2, 9])
@pytest.mark.parametrize("where", ["memory", "disk", "disk, over its budget"])
def test_all_versions_are_there_bit_for_bit_those_before_and_those_after(where, hot, tmp_path):
    states = history(KINDS)
    budget = 1 if "budget" in where else None
    folder = tmp_path / "versions" if "disk" in where else None
    with PatchStore(folder, hot=hot, budget_bytes=budget) as store:
        filled(store, states[3:4], first=3)
        store.take_over(given_away(states[:4], hot=hot))
        assert store.versions == (0, 1, 2, 3)
        filled(store, states[4:], first=4)
        for version in (0, 6, 2, 5, 1, 3, 4):
            with store.checkout(version) as found:
                assert_bits(found, states[version])
        store.verify()
        assert filled(PatchStore(hot=hot), states).older().keys() == store.older().keys()
        assert store.retain(2) == [0, 1]
        with pytest.raises(VersionEvictedError), store.checkout(1):
            pass


def test_patches_that_do_not_lead_to_the_first_version_are_refused_and_nothing_changes():
    states, others = history(KINDS), history(["dense", "sparse", "many", "sparse"])
    store = filled(PatchStore(), states[3:4], first=3)
    right = given_away(states[:4])
    without_one = {ends: content for ends, content in right.items() if ends != (1, 2)}
    renamed = {(base, target + (base == 2)): content for (base, target), content in right.items()}
    cut = right | {(0, 1): right[0, 1][:-1]}
    for wrong in (given_away(states[:3]), without_one, renamed, cut, right | {(1, 2): right[0, 1]}, given_away(others[:4])):
        with pytest.raises(PatchError):
            store.take_over(wrong)
        assert store.versions == (3,)
    store.take_over(right)
    assert store.versions == (0, 1, 2, 3)
    store.verify()


def test_a_store_of_one_version_gives_nothing_away_and_takes_nothing():
    states = history(["sparse"])
    store = filled(PatchStore(), states[:1])
    assert store.older() == {}
    store.take_over({})
    assert store.versions == (0,)
    assert PatchStore().older() == {}
