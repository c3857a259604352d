import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oldlogits.batch.pad import micro_batches
from oldlogits.batch.sequences import Sequences
from oldlogits.batch.shard import shard_micro_batches, shares


def sequences_of(lengths):
    starts = np.cumsum([0, *lengths]).astype(np.int64)
    n = int(starts[-1])
    return Sequences(token_ids=np.arange(n), temperature=np.ones(n, np.float32), starts=starts)


def tokens_of(batch):
    """All but the first of each sequence."""
    return np.setdiff1d(np.arange(batch.num_tokens), batch.starts[:-1])


def test_the_longest_are_dealt_first_forth_and_back():
    batch = sequences_of([10, 8, 5, 4])  # of which 9, 7, 4 and 3 tokens are read
    first, second = shares(batch, tokens_of(batch), 2)
    assert set(batch.sequence[first]) == {0, 3}
    assert set(batch.sequence[second]) == {1, 2}


@given(st.lists(st.integers(2, 30), min_size=1, max_size=12), st.integers(1, 5), st.integers(1, 60))
def test_every_token_counts_once_and_all_ranks_make_as_many_forward_passes(lengths, num_ranks, budget):
    batch = sequences_of(lengths)
    tokens = tokens_of(batch)
    sharded = [list(shard_micro_batches(batch, tokens, budget, rank=rank, num_ranks=num_ranks)) for rank in range(num_ranks)]
    assert len({len(mine) for mine in sharded}) == 1
    counted = np.concatenate([one.micro.flat.numpy() for mine in sharded for one in mine if not one.is_padding])
    assert np.array_equal(np.sort(counted), tokens)
    assert all(one.micro.input_ids.numel() > 0 for mine in sharded for one in mine)


@given(st.lists(st.integers(2, 30), min_size=1, max_size=12), st.integers(1, 60))
def test_one_rank_gets_the_micro_batches_of_the_whole(lengths, budget):
    batch = sequences_of(lengths)
    tokens = tokens_of(batch)
    sharded = list(shard_micro_batches(batch, tokens, budget, rank=0, num_ranks=1))
    whole = list(micro_batches(batch, tokens, budget))
    assert not any(one.is_padding for one in sharded)
    assert [one.micro.flat.tolist() for one in sharded] == [micro.flat.tolist() for micro in whole]


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_nothing_to_score_is_no_forward_pass(rank):
    assert list(shard_micro_batches(sequences_of([3]), np.zeros(0, np.int64), 10, rank=rank, num_ranks=3)) == []
