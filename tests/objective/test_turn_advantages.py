"""Advantages of turns: each token is compared by what its episode was given from its turn on."""

import dataclasses
import statistics
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oldlogits.config.objective.sections import ObjectiveConfig
from oldlogits.core.trajectory import TrajectoryGroup
from oldlogits.loop.reference import batch_of
from oldlogits.objective.advantages import advantages_of, turn_advantages_of
from oldlogits.train.loss_tokens import LossTokens
from tests.builders import sampled, trajectory

amounts = st.integers(-8, 8).map(lambda n: n / 4)
episodes = st.lists(st.tuples(st.lists(amounts, min_size=1, max_size=4), amounts, st.integers(0, 1)), min_size=1, max_size=5)


def group_of(*members, id="g0"):
    """Members of (rewards of turns, reward of the end, turns at the end that were not answered); turn k says k + 1 tokens."""
    made = []
    for i, (turns, last, num_more) in enumerate(members):
        segments = [s for k in range(len(turns) + num_more) for s in ([3], sampled([4] * (k + 1)))]
        one = trajectory(*segments, id=f"{id}.{i}", group=id, reward=sum(turns) + last)
        made.append(dataclasses.replace(one, turn_rewards=tuple(turns)))
    return TrajectoryGroup(id=id, trajectories=tuple(made))


def by_hand(members):
    """One turn at a time, in exact arithmetic."""
    togo = [
        [sum(map(Fraction, turns[k:])) + Fraction(last) for k in range(len(turns) + num_more)]
        for turns, last, num_more in members
    ]
    found = []
    for own in togo:
        for k, value in enumerate(own):
            baseline = statistics.mean(other[k] for other in togo if k < len(other))
            found += [float(value - baseline)] * (k + 1)
    return found


@given(members=episodes)
def test_each_tokens_advantage_is_its_turns_return_to_go_less_the_groups_mean(members):
    assert turn_advantages_of([group_of(*members)]) == pytest.approx(by_hand(members), abs=1e-12)


def test_the_example_of_the_docstring():
    group = group_of(([1.0, 0.0], 0.0, 0), ([0.0, 2.0], 0.0, 0))
    assert turn_advantages_of([group]) == [-0.5, -1.0, -1.0, 0.5, 1.0, 1.0]


@pytest.mark.parametrize("value", [0.1, 1e8 + 1 / 3])
def test_equal_rewards_and_groups_of_one_have_exactly_none(value):
    alike = group_of(*[([], value, 3)] * 3)
    assert turn_advantages_of([alike]) == [0.0] * 18
    assert turn_advantages_of([group_of(([0.3, 0.1], value, 0))]) == [0.0] * 3


def test_without_rewards_of_turns_and_with_as_many_of_them_it_is_mean_only():
    group = group_of(([], 1.0, 2), ([], 0.0, 2), ([], 0.5, 2))
    expected = [a for a in advantages_of([group], "mean-only") for _ in range(3)]
    assert turn_advantages_of([group]) == pytest.approx(expected)


def test_a_batch_carries_them_to_each_loss_token_and_other_modes_carry_none():
    groups = [group_of(([1.0, 0.0], 0.0, 0), ([0.0, 2.0], 0.0, 0)), group_of(([0.5], 0.0, 0), ([0.0], 0.0, 0), id="g1")]
    batch = batch_of(groups, ObjectiveConfig(advantage="turn-to-go"), num_steps=2)
    expected = np.float32([-0.5, -1, -1, 0.5, 1, 1, 0.25, -0.25])
    assert batch.token_advantages.tolist() == expected.tolist()
    tokens = LossTokens.of(batch, None, 0)
    assert torch.equal(tokens.advantages, torch.from_numpy(expected))
    here = torch.tensor([7, 1, 3])
    assert tokens.inputs(here, tokens.logp).advantages.tolist() == expected[here.numpy()].tolist()
    plain = batch_of(groups, ObjectiveConfig(advantage="mean-only"), num_steps=2)
    assert plain.token_advantages is None
    of_sequences = LossTokens.of(plain, None, 0).advantages
    assert of_sequences.tolist() == plain.advantages[plain.sequence[plain.loss_mask]].tolist()
