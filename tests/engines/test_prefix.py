import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oldlogits.engines.embedded.prefix import BLOCK, NO_MATCH, FreeSlots, Match, OwnSlots, PrefixIndex, chain_keys

tokens = st.lists(st.integers(0, 1), max_size=3 * BLOCK + 5)


def held(*sequences):
    index = PrefixIndex(len(sequences))
    for slot, sequence in enumerate(sequences):
        index.hold(slot, sequence, chain_keys(sequence))
    return index


def common(left, right):
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(st.lists(tokens, min_size=1, max_size=4), st.data())
def test_a_match_is_the_longest_common_prefix_of_at_least_a_block(sequences, data):
    query = data.draw(st.one_of(tokens, st.sampled_from(sequences).flatmap(lambda s: tokens.map(lambda t: s + t))))
    match = held(*sequences).match(query, chain_keys(query))
    longest = max(common(query, sequence) for sequence in sequences)
    if longest < BLOCK:
        assert match == NO_MATCH
    else:
        assert match.length == longest
        assert common(query, sequences[match.slot]) == longest


def test_a_slot_that_holds_other_tokens_is_no_longer_found():
    first, second = list(range(20)), list(range(50, 70))
    index = held(first, first)
    assert index.match(first, chain_keys(first)) == Match(slot=0, length=20)
    index.hold(0, second, chain_keys(second))
    assert index.match(first, chain_keys(first)) == Match(slot=1, length=20)
    index.hold(1, first[:17], chain_keys(first))
    assert index.match(first, chain_keys(first)) == Match(slot=1, length=17)
    index.clear()
    assert index.match(second, chain_keys(second)) == NO_MATCH
    assert index.length(0) == index.length(1) == 0


def test_two_blocks_with_one_hash_are_told_apart_by_their_tokens():
    first, second = [1] * BLOCK, [2] * BLOCK
    index = PrefixIndex(1)
    index.hold(0, first, [99])
    assert index.match(second, [99]) == NO_MATCH
    assert index.match(first, [99]) == Match(slot=0, length=BLOCK)


@given(tokens, tokens)
@settings(max_examples=100, deadline=None)
def test_keys_continue_from_known_keys(start, more):
    assert chain_keys(start + more, chain_keys(start)) == chain_keys(start + more)
    assert len(chain_keys(start)) == len(start) // BLOCK


def test_what_a_trajectory_left_is_its_own_once_it_is_of_older_versions_and_begins_its_tokens():
    own = OwnSlots()
    own.leave(3, "a", [1, 2], "mixed")
    own.leave(4, "b", [1, 2, 3], "fresh")
    assert own.match("a", [1, 2, 7]) == Match(slot=3, length=2, kv="mixed")
    assert own.match("a", [1, 3, 7]) == own.match("a", [1]) == own.match("c", [1, 2, 7]) == NO_MATCH
    assert own.match("b", [1, 2, 3]) == NO_MATCH, "of the current version: found by everybody"
    own.age()
    assert own.match("b", [1, 2, 3]) == Match(slot=4, length=3, kv="mixed")
    own.clear()
    assert own.match("a", [1, 2]) == own.match("b", [1, 2, 3]) == NO_MATCH


def test_a_slot_that_was_taken_or_left_for_another_is_its_trajectorys_no_more():
    own = OwnSlots()
    own.leave(0, "a", [1], "mixed")
    own.leave(1, "a", [1, 2], "mixed")
    own.take(0)
    assert own.match("a", [1, 2]) == Match(slot=1, length=2, kv="mixed")
    own.take(1)
    assert own.match("a", [1, 2]) == NO_MATCH
    own.leave(1, "b", [5], "mixed")
    assert own.match("b", [5, 6]).slot == 1


@given(st.lists(st.one_of(st.just(None), st.integers(0, 5)), max_size=60))
@settings(max_examples=100, deadline=None)
def test_the_next_slot_is_the_lowest_cool_one_else_the_one_freed_first(calls):
    """None: a step passes and the next slot is taken; a number: that slot is freed."""
    slots, step = FreeSlots(6, 4), 0
    freed_at = dict.fromkeys(range(6), -4)
    for call in calls:
        if call is None:
            step += 1
            if freed_at:
                cool = [slot for slot, at in freed_at.items() if step - at >= 4]
                expected = min(cool) if cool else min(freed_at, key=lambda slot: (freed_at[slot], slot))
                assert slots.next(step) == expected
                slots.take(expected)
                del freed_at[expected]
        elif call not in freed_at:
            slots.free(call, step)
            freed_at[call] = step
        assert len(slots) == len(freed_at)
        assert all((slot in slots) == (slot in freed_at) for slot in range(6))
