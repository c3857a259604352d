"""A packed row holds every sequence, what several begin with once, and micro-batches keep their budget."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oldlogits.batch import trie
from oldlogits.batch.pack import packed_micro_batches
from oldlogits.batch.sequences import Sequences
from oldlogits.batch.shard import shard_micro_batches
from oldlogits.batch.trie import balanced, cut, dealt, grow, sort


def sequences_of(lists, kin=None):
    starts = np.cumsum([0, *map(len, lists)]).astype(np.int64)
    ids = np.array([i for one in lists for i in one], np.int64)
    return Sequences(token_ids=ids, temperature=np.ones(len(ids), np.float32), starts=starts, kin=kin)


@st.composite
def forests(draw):
    """Sequences that branch off each other at any token: equal ones, prefixes of others and single tokens among them."""
    lists = [draw(st.lists(st.integers(0, 2), min_size=1, max_size=40))]
    for _ in range(draw(st.integers(0, 9))):
        stem = draw(st.sampled_from(lists))[: draw(st.integers(0, 40))]
        lists.append([*stem, *draw(st.lists(st.integers(0, 2), min_size=0 if stem else 1, max_size=20))])
    return lists


def laid_out(lists):
    batch = sequences_of(lists)
    found = sort(batch, batch.lengths, shares=True)
    made, place, offsets = grow(found)
    rows = {int(row): place[start : start + n] for row, start, n in zip(found.rows, offsets, found.lengths, strict=True)}
    return made, rows


@given(forests())
def test_a_packed_row_holds_each_token_of_each_sequence_at_its_position(lists):
    made, rows = laid_out(lists)
    ids = np.full(len(made.positions), -1)
    for row, place in rows.items():
        assert made.positions[place].tolist() == list(range(len(lists[row])))
        assert set(ids[place]) <= {-1, *lists[row]}, "another sequence may have put its own token there, never a different one"
        assert all(ids[place][ids[place] >= 0] == np.array(lists[row])[ids[place] >= 0])
        ids[place] = lists[row]
    assert (ids >= 0).all()


@given(forests())
def test_what_stands_above_a_token_is_what_its_sequences_begin_with_and_nothing_else(lists):
    made, rows = laid_out(lists)
    for place in rows.values():
        last = place[-1]
        seen = {
            k for start, end, after in made.nodes.tolist() for k in range(start, end) if start <= last < after and k <= last
        }
        assert seen == set(place.tolist())


@given(forests())
def test_each_distinct_beginning_stands_once_where_nothing_is_too_small_to_share(lists):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trie, "MIN_SAVED", 1)
        made, _ = laid_out(lists)
    assert len(made.positions) == len({tuple(one[:n]) for one in lists for n in range(1, len(one) + 1)})


def test_what_saves_less_than_a_call_of_attention_costs_is_read_by_each():
    common = list(range(15))
    assert len(laid_out([[*common, 90], [*common, 91]])[0].positions) == 32, "15 tokens saved"
    assert len(laid_out([[*common, 80, 90], [*common, 80, 91]])[0].positions) == 18, "16 tokens saved"


@given(forests(), st.integers(1, 60), st.booleans())
def test_micro_batches_hold_every_sequence_once_within_the_budget(lists, budget, shares):
    batch = sequences_of(lists)
    found = sort(batch, batch.lengths, shares=shares)
    for runs in (cut(found, tokens=budget), balanced(found, tokens=budget)):
        assert [row for start, end in runs for row in range(start, end)] == list(range(len(lists)))
        for start, end in runs:
            num = len(grow(found.part(start, end))[0].positions)
            assert num <= budget or end - start == 1
            assert num == (found.part(start, end).lengths - found.part(start, end).shared).sum()


def test_a_group_that_does_not_fit_any_more_begins_the_next_micro_batch():
    groups = [[[g] * 30 + [g, 50 + i] for i in range(4)] for g in range(3)]  # 30 + 4 * 2 tokens each
    batch = sequences_of([one for group in groups for one in group])
    found = sort(batch, batch.lengths, shares=True)
    assert cut(found, tokens=100) == [(0, 8), (8, 12)], "two groups are 76 tokens, a part of the third would read its 30 again"


def test_costs_of_micro_batches_and_of_ranks_are_balanced_by_attention_as_well_as_by_tokens():
    batch = sequences_of([[i] * n for i, n in enumerate([20_000, 5_000, 5_000, 5_000, 5_000])])
    found = sort(batch, batch.lengths, shares=True)
    first, second = dealt(found, 2)
    assert sorted(map(len, (first, second))) == [1, 4], "by tokens alone the long one would be given another beside it"
    even = sequences_of([[i] * 10 for i in range(12)])
    runs = balanced(sort(even, even.lengths, shares=True), tokens=50)
    assert [end - start for start, end in runs] == [4, 4, 4], "as few as without balance, which would make 5, 5 and 2"


@given(forests(), st.integers(1, 4), st.integers(1, 60), st.sampled_from(["shared", "packed"]))
def test_every_token_counts_once_and_all_ranks_make_as_many_forward_passes(lists, num_ranks, budget, layout):
    batch = sequences_of(lists)
    tokens = np.setdiff1d(np.arange(batch.num_tokens), batch.starts[:-1])
    sharded = [
        list(shard_micro_batches(batch, tokens, budget, rank=rank, num_ranks=num_ranks, layout=layout))
        for rank in range(num_ranks)
    ]
    assert len({len(mine) for mine in sharded}) == 1
    counted = [one.micro.flat.numpy() for mine in sharded for one in mine if not one.is_padding]
    assert np.array_equal(np.sort(np.concatenate([np.zeros(0, np.int64), *counted])), tokens)


@given(st.lists(st.integers(2, 30), min_size=1, max_size=12), st.integers(1, 60), st.data())
def test_sequences_of_one_kin_are_in_one_micro_batch_and_share_nothing(lengths, budget, data):
    kin = np.sort(data.draw(st.lists(st.integers(0, 4), min_size=len(lengths), max_size=len(lengths)))).astype(np.int64)
    batch = sequences_of([[1] * n for n in lengths], kin)
    micros = list(packed_micro_batches(batch, batch.starts[1:] - 1, budget, shares=False))
    where = [set(kin[np.searchsorted(batch.starts, micro.flat.numpy(), side="right") - 1]) for micro in micros]
    assert sum(map(len, where)) == len(set(kin))
    assert sum(micro.num_read for micro in micros) == sum(lengths) - len(lengths)


def test_branches_of_one_episode_that_each_share_more_than_the_one_before_fill_micro_batches():
    history, branches = [5] * 800, 40  # each with 5 tokens of its own, which later branches do not have
    batch = sequences_of([[*history[: 20 * (i + 1)], *[1] * 5] for i in range(branches)])
    found = sort(batch, batch.lengths, shares=True)
    assert found.shared.tolist() == [0, *range(20, 800, 20)]
    runs = cut(found, tokens=900)
    parts = [found.part(*run) for run in runs]
    assert len(runs) == 2, "1,000 tokens in all"
    assert sum(int((part.lengths - part.shared).sum()) for part in parts) < 2 * 900
