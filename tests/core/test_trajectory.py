import copy
import math
import pickle
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oldlogits.core.errors import TrajectoryError
from oldlogits.core.trajectory import Context, Ints, Sampled, Trajectory, TrajectoryGroup

from ..builders import sampled, trajectory

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    "wrong, says",
    [
        ({"token_ids": (), "logp_mu": ()}, "empty"),
        ({"logp_mu": (-1.0,)}, "2 tokens and 1 log-probs"),
        ({"version": -1}, "a version counts from 0"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": INF}, "temperature"),
        ({"temperature": NAN}, "temperature"),
        ({"logp_mu": (-1.0, 0.5)}, "above 0"),
        ({"logp_mu": (-1.0, INF)}, "above 0"),
        ({"logp_mu": (NAN, 0.5)}, "above 0"),
        ({"logp_mu": (0.5, NAN)}, "above 0"),
    ],
)
def test_a_sampled_segment_refuses_what_no_engine_can_have_sampled(wrong, says):
    good = {"token_ids": (1, 2), "logp_mu": (-1.0, -2.0), "version": 0}
    Sampled(**good)
    with pytest.raises(TrajectoryError, match=says):
        Sampled(**good | wrong)


def test_a_log_prob_may_be_zero_up_to_rounding_minus_infinity_or_nan_to_be_counted_later():
    assert sampled([1, 2, 3, 4], logp=[0.0, 1e-5, -INF, NAN]).logp_mu[:3] == (0.0, 1e-5, -INF)


def test_an_empty_context_is_refused():
    with pytest.raises(TrajectoryError, match="empty"):
        Context(token_ids=())


@pytest.mark.parametrize(
    "segments, says",
    [
        ((), "does not start with its prompt"),
        ((sampled([1]),), "does not start with its prompt"),
        (([1],), "has no sampled token"),
        (([1], sampled([2], 3), [4], sampled([5], 2)), r"decrease; got: \[3, 2\]"),
    ],
)
def test_a_trajectory_refuses_segments_that_contradict_each_other(segments, says):
    with pytest.raises(TrajectoryError, match=says):
        trajectory(*segments, id="g7.1")


@pytest.mark.parametrize("reward", [NAN, INF, -INF])
def test_a_reward_is_finite(reward):
    with pytest.raises(TrajectoryError, match=r"the reward of trajectory g7\.1 is not finite"):
        trajectory([1], sampled([2]), id="g7.1", reward=reward)


@pytest.mark.slow
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1), st.lists(st.integers(0, 5), min_size=1))
def test_counts_and_versions_are_those_of_the_segments(sizes, versions):
    versions = sorted(versions)[: len(sizes)]
    versions += [versions[-1]] * (len(sizes) - len(versions))
    segments = [s for (read, said), v in zip(sizes, versions, strict=True) for s in ([1] * read, sampled([2] * said, v))]
    one = trajectory(*segments)
    assert one.num_tokens == sum(map(sum, sizes))
    assert one.num_sampled == sum(said for _, said in sizes)
    assert one.versions == tuple(sorted(set(versions)))
    assert TrajectoryGroup(id="g0", trajectories=(one,)).oldest_version == versions[0]


def test_the_oldest_version_of_a_group_is_that_of_its_oldest_token():
    old, new = trajectory([1], sampled([2], 4), sampled([2], 9)), trajectory([1], sampled([2], 5), id="g0.1")
    assert TrajectoryGroup(id="g0", trajectories=(new, old)).oldest_version == 4


def test_a_group_refuses_to_be_empty_and_members_of_other_groups():
    with pytest.raises(TrajectoryError, match="empty"):
        TrajectoryGroup(id="g0", trajectories=())
    with pytest.raises(TrajectoryError, match=r"got: \['g1\.0'\]"):
        TrajectoryGroup(id="g0", trajectories=(trajectory([1], sampled([2]), id="g1.0", group="g1"),))


def test_trajectories_are_frozen_and_compare_by_value():
    one = trajectory([1], sampled([2]))
    assert one == trajectory([1], sampled([2]))
    with pytest.raises(AttributeError):
        one.reward = 1.0
    with pytest.raises(TypeError):
        Trajectory("g0.0", "g0", one.segments, 0.0, "done")


def test_tokens_and_log_probs_are_flat_and_are_equal_to_the_tuples_that_they_were_given_as():
    one = Sampled(token_ids=(300, 4, 500), logp_mu=[-0.1, -0.25, NAN], version=2)
    assert isinstance(one.token_ids, Ints)
    assert one.token_ids == (300, 4, 500) == one.token_ids
    assert one.token_ids != (300, 4)
    assert one.logp_mu[:2] == (-0.1, -0.25), "no digit is lost"
    assert (*one.token_ids[1:], one.token_ids[-1]) == (4, 500, 500)
    assert repr(one.token_ids) == "(300, 4, 500)"
    assert np.asarray(one.token_ids, np.int64).tolist() == [300, 4, 500]
    read = Context(token_ids=range(300, 304))
    assert {read: 1}[Context(token_ids=[300, 301, 302, 303])] == 1
    assert hash(read.token_ids) == hash((300, 301, 302, 303))
    assert pickle.loads(pickle.dumps(read)) == copy.deepcopy(read) == read


def test_a_queued_trajectory_takes_a_fifth_of_the_memory_of_tuples_at_most():
    def bytes_of(keep):
        tracemalloc.start()
        kept = [keep(list(range(1000 * i, 1000 * i + 900)), [-1e-3 * j for j in range(100)]) for i in range(1, 20)]
        size = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert kept
        return size

    tuples = bytes_of(lambda ids, logps: (tuple(ids), tuple(ids[:100]), tuple(logps)))
    segments = bytes_of(lambda ids, logps: (Context(token_ids=ids), Sampled(token_ids=ids[:100], logp_mu=logps, version=0)))
    assert segments < tuples / 5


@pytest.mark.parametrize("ids", [(2**31,), (-(2**31) - 1,), ("a",), (1.5,)])
def test_a_token_id_that_is_none_is_refused(ids):
    with pytest.raises(TrajectoryError, match="token ids"):
        Context(token_ids=ids)
