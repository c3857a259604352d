import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oldlogits.batch.collate import collate
from oldlogits.core.errors import TrajectoryError
from oldlogits.core.trajectory import Context, TrajectoryGroup

from ..builders import batch_of, sampled, trajectory

ids = st.lists(st.integers(0, 99), min_size=1, max_size=4)
turn = st.tuples(ids, ids, st.sampled_from([0.5, 1.0]), st.sampled_from(["fresh", "mixed"]))


@st.composite
def trajectories(draw):
    """Three groups of one to three trajectories of one to three turns, versions rising."""
    made = []
    for group in range(3):
        for member in range(draw(st.integers(1, 3))):
            turns = draw(st.lists(turn, min_size=1, max_size=3))
            version, segments = draw(st.integers(0, 3)), []
            for read, said, temperature, kv in turns:
                version += draw(st.integers(0, 2))
                logps = [-float(i) - len(segments) for i in said]
                segments += [read, sampled(said, version, logp=logps, kv=kv, temperature=temperature)]
            name = f"g{group}"
            made.append(trajectory(*segments, id=f"{name}.{member}", group=name, reward=float(member)))
    return made


def test_a_batch_by_hand():
    first = trajectory([5, 6], sampled([7, 8], 3, logp=[-0.5, -0.25]), [9], sampled([1], 4, kv="mixed", temperature=0.5))
    second = trajectory([5], sampled([2], 4), id="g0.1", reward=1.0)
    batch = batch_of([first, second], [-0.7, 0.7])
    np.testing.assert_array_equal(batch.token_ids, [5, 6, 7, 8, 9, 1, 5, 2])
    np.testing.assert_array_equal(batch.loss_mask, [False, False, True, True, False, True, False, True])
    np.testing.assert_array_equal(batch.version, [-1, -1, 3, 3, -1, 4, -1, 4])
    np.testing.assert_array_equal(batch.logp_mu, [0, 0, -0.5, -0.25, 0, -1, 0, -1])
    np.testing.assert_array_equal(batch.temperature, [1, 1, 1, 1, 1, 0.5, 1, 1])
    np.testing.assert_array_equal(batch.mixed_kv, [False] * 5 + [True] + [False] * 2)
    np.testing.assert_array_equal(batch.starts, [0, 6, 8])
    np.testing.assert_array_equal(batch.sequence, [0] * 6 + [1] * 2)
    np.testing.assert_array_equal(batch.advantages, np.float32([-0.7, 0.7]))
    np.testing.assert_array_equal(batch.rewards, [0, 1])
    assert batch.trajectory_ids == ("g0.0", "g0.1")
    assert batch.versions == (3, 4)


@pytest.mark.slow
@given(trajectories(), st.integers(1, 3))
def test_every_token_keeps_what_its_segment_says_in_order(made, num_steps):
    batch = batch_of(made, [float(i) for i in range(len(made))], num_steps=num_steps)
    rows = [
        (token, False, -1, 0.0, 1.0, False)
        if isinstance(s, Context)
        else (token, True, s.version, s.logp_mu[k], s.temperature, s.kv == "mixed")
        for one in made
        for s in one.segments
        for k, token in enumerate(s.token_ids)
    ]
    columns = (batch.token_ids, batch.loss_mask, batch.version, batch.logp_mu, batch.temperature, batch.mixed_kv)
    assert list(zip(*(c.tolist() for c in columns), strict=True)) == rows
    assert [c.dtype for c in columns] == [np.int64, np.bool_, np.int64, np.float32, np.float32, np.bool_]
    assert batch.lengths.tolist() == [one.num_tokens for one in made]
    assert batch.num_tokens == len(rows)
    assert batch.versions == tuple(sorted({v for one in made for v in one.versions}))
    assert batch.trajectory_ids == tuple(one.id for one in made)


@pytest.mark.slow
@given(trajectories(), st.integers(1, 3))
def test_groups_are_dealt_out_over_the_steps_whole_and_in_turn(made, num_steps):
    batch = batch_of(made, num_steps=num_steps)
    expected = [int(one.group_id[1:]) % num_steps for one in made]
    assert batch.step.tolist() == expected
    assert set(expected) == set(range(num_steps))


def test_a_nan_log_prob_stays_nan():
    batch = batch_of([trajectory([1], sampled([2, 3], logp=[float("nan"), -1.0]))])
    assert np.isnan(batch.logp_mu).tolist() == [False, True, False]


@pytest.mark.parametrize("advantages", [[], [1.0], [1.0, 2.0, 3.0]])
def test_there_is_one_advantage_for_each_trajectory(advantages):
    group = TrajectoryGroup(id="g0", trajectories=(trajectory([1], sampled([2])), trajectory([1], sampled([2]), id="g0.1")))
    with pytest.raises(TrajectoryError, match=f"2 trajectories, {len(advantages)} advantages"):
        collate([group], advantages, num_steps=1)


def test_a_batch_of_nothing_is_refused():
    with pytest.raises(TrajectoryError, match="0 trajectories, 0 advantages"):
        collate([], [], num_steps=1)
