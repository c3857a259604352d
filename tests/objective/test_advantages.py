import statistics
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oldlogits.core.errors import ConfigError
from oldlogits.core.trajectory import TrajectoryGroup
from oldlogits.objective.advantages import advantages_of
from tests.builders import sampled, trajectory

from .typed import group_advantages

MODES = ("group-normalised", "mean-only", "leave-one-out")
reward = st.floats(-100, 100).map(lambda r: round(r, 3))
batches = st.lists(st.tuples(reward, st.sampled_from([-5, 0, 3, 10**12])), max_size=20)


def by_hand(batch, mode, epsilon=1e-6):
    """Exact arithmetic: equal rewards have no spread at all."""
    batch, result = [(Fraction(r), g) for r, g in batch], []
    for i, (own, group) in enumerate(batch):
        members = [r for r, g in batch if g == group]
        others = [r for j, (r, g) in enumerate(batch) if g == group and j != i]
        if not others:
            result.append(0.0)
        elif mode == "leave-one-out":
            result.append(float(own - statistics.mean(others)))
        else:
            scale = statistics.stdev(members) + epsilon if mode == "group-normalised" else 1.0
            result.append(float(own - statistics.mean(members)) / scale)
    return result


def advantages(batch, mode, dtype=torch.float64):
    rewards = torch.tensor([r for r, _ in batch], dtype=dtype)
    return group_advantages(rewards, torch.tensor([g for _, g in batch], dtype=torch.int64), mode).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@given(batch=batches)
def test_advantages_equal_the_formula_in_plain_python(mode, batch):
    assert advantages(batch, mode) == pytest.approx(by_hand(batch, mode), rel=1e-8, abs=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(value=st.floats(-1e6, 1e6, width=32), size=st.integers(1, 17))
def test_a_group_of_equal_rewards_is_exactly_zero_throughout(mode, dtype, value, size):
    assert advantages([(value, 0)] * size + [(1.0, 1), (2.0, 1)], mode, dtype)[:size] == [0.0] * size


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@given(batch=batches)
def test_advantages_of_a_group_sum_to_zero(mode, batch):
    for group in {g for _, g in batch}:
        of_group = [a for a, (_, g) in zip(advantages(batch, mode), batch, strict=True) if g == group]
        assert sum(of_group) == pytest.approx(0.0, abs=1e-8)


@pytest.mark.parametrize("mode", MODES)
def test_the_order_of_trajectories_does_not_matter(mode):
    batch = [(1.0, 7), (0.0, 2), (0.5, 7), (1.0, 2), (0.25, 7)]
    order = [3, 0, 4, 2, 1]
    shuffled = advantages([batch[i] for i in order], mode)
    assert shuffled == pytest.approx([advantages(batch, mode)[i] for i in order], abs=1e-12)


def test_the_documented_example_holds():
    batch = [(0.0, 0), (0.0, 0), (1.0, 0)]
    assert advantages(batch, "group-normalised") == pytest.approx([-0.57735, -0.57735, 1.1547], abs=1e-5)
    assert advantages(batch, "mean-only") == pytest.approx([-1 / 3, -1 / 3, 2 / 3])
    assert advantages(batch, "leave-one-out") == pytest.approx([-0.5, -0.5, 1.0])


def test_an_unknown_mode_is_refused():
    from oldlogits.objective import group_advantages as unchecked

    with pytest.raises(ConfigError, match="unknown advantage mode"):
        unchecked(torch.zeros(2), torch.zeros(2, dtype=torch.int64), "median")


OVER_BATCH = ("batch-normalised", "token-normalised", "batch-baseline")
counted = st.lists(st.tuples(reward, st.sampled_from([-5, 0, 3]), st.integers(1, 9)), min_size=1, max_size=12)


def over_batch(batch, mode, epsilon=1e-6):
    """Mean and deviation over a list in which each reward stands once, or once for each of its tokens, in exact arithmetic."""
    rewards = [Fraction(r) for r, _, _ in batch]
    if mode == "batch-baseline":
        numerators = [r - statistics.mean(rewards) for r in rewards]
    else:
        means = {
            g: statistics.mean(r for r, (_, other, _) in zip(rewards, batch, strict=True) if other == g) for _, g, _ in batch
        }
        numerators = [r - means[g] for r, (_, g, _) in zip(rewards, batch, strict=True)]
    if mode == "token-normalised":
        every = [x for x, (_, _, num) in zip(numerators, batch, strict=True) for _ in range(num)]
        numerators = [x - statistics.mean(every) for x in numerators]
        every = [x for x, (_, _, num) in zip(numerators, batch, strict=True) for _ in range(num)]
    else:
        every = numerators
    spread = statistics.stdev(every) if len(every) > 1 else 0.0
    return [float(x) / (float(spread) + epsilon) for x in numerators]


def of_batch(batch, mode):
    rewards = torch.tensor([r for r, _, _ in batch], dtype=torch.float64)
    groups, num_tokens = (torch.tensor([one[i] for one in batch]) for i in (1, 2))
    return group_advantages(rewards, groups, mode, num_tokens=num_tokens).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("mode", OVER_BATCH)
@given(batch=counted)
def test_advantages_over_the_batch_equal_the_formula_in_plain_python(mode, batch):
    assert of_batch(batch, mode) == pytest.approx(over_batch(batch, mode), rel=1e-6, abs=1e-6)


EXAMPLES = {  # rewards 0, 1 | 0, 0, 3 of 1, 3 | 2, 2, 1 tokens
    "batch-normalised": [-0.5, 0.5, -1.0, -1.0, 2.0],
    "token-normalised": [-0.5 + 1 / 9, 0.5 + 1 / 9, -1 + 1 / 9, -1 + 1 / 9, 2 + 1 / 9],
    "batch-baseline": [-0.8, 0.2, -0.8, -0.8, 2.2],
}
VARIANCES = {"batch-normalised": 6.5 / 4, "token-normalised": (0.25 + 0.75 + 4 + 4 - 1 / 9) / 8, "batch-baseline": 6.8 / 4}


@pytest.mark.parametrize("mode", OVER_BATCH)
def test_a_batch_by_hand(mode):
    batch = [(0.0, 0, 1), (1.0, 0, 3), (0.0, 7, 2), (0.0, 7, 2), (3.0, 7, 1)]
    deviation = VARIANCES[mode] ** 0.5 + 1e-6
    assert of_batch(batch, mode) == pytest.approx([x / deviation for x in EXAMPLES[mode]], rel=1e-9)
    assert over_batch(batch, mode) == pytest.approx(of_batch(batch, mode), rel=1e-6)


@pytest.mark.parametrize("mode", OVER_BATCH)
@pytest.mark.parametrize("value", [0.1, 1e8 + 1 / 3, -7.7])
def test_a_batch_of_equal_rewards_is_exactly_zero_throughout(mode, value):
    assert of_batch([(value, i // 3, i + 1) for i in range(7)], mode) == [0.0] * 7


@pytest.mark.parametrize("mode", OVER_BATCH)
def test_one_trajectory_is_its_own_baseline(mode):
    assert of_batch([(0.7, 0, 5)], mode) == [0.0]


def test_groups_of_one_are_compared_with_the_batch_alone():
    batch = [(0.0, 0, 5), (0.0, 1, 5), (1.0, 2, 5)]
    assert of_batch(batch, "batch-normalised") == [0.0] * 3
    third = 1 / 3
    deviation = (1 / 3) ** 0.5 + 1e-6
    assert of_batch(batch, "batch-baseline") == pytest.approx([-third / deviation, -third / deviation, 2 * third / deviation])


def test_under_its_tokens_a_token_normalised_batch_has_mean_0_and_variance_1():
    batch = [(0.0, 0, 1), (1.0, 0, 3), (0.0, 7, 2), (0.0, 7, 20), (3.0, 7, 1)]
    tokens = [a for a, (_, _, num) in zip(of_batch(batch, "token-normalised"), batch, strict=True) for _ in range(num)]
    assert statistics.mean(tokens) == pytest.approx(0, abs=1e-12)
    assert statistics.stdev(tokens) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("mode", OVER_BATCH)
def test_a_reward_that_is_not_a_number_leaves_no_advantage_that_is_one(mode):
    assert all(a != a for a in of_batch([(float("nan"), 0, 1), (1.0, 0, 2), (2.0, 0, 1)], mode))


def test_the_measure_of_tokens_needs_their_numbers():
    with pytest.raises(ConfigError, match="num_tokens"):
        group_advantages(torch.zeros(2), torch.tensor([0, 0]), "token-normalised")


def groups_of(*members):
    """Groups of trajectories of (reward, sampled tokens, branch)."""
    made = []
    for g, group in enumerate(members):
        ids = [f"g{g}.{i}" + (f"#{branch}" if branch else "") for i, _, _, branch in group]
        of_group = [
            trajectory([3], sampled([4] * num), id=id, group=f"g{g}", reward=r)
            for id, (_, r, num, _) in zip(ids, group, strict=True)
        ]
        made.append(TrajectoryGroup(id=f"g{g}", trajectories=tuple(of_group)))
    return made


def test_an_episode_counts_once_with_the_tokens_of_all_its_branches():
    groups = groups_of([(0, 0.0, 1, 0), (1, 1.0, 1, 0), (1, 1.0, 2, 1)], [(0, 0.0, 2, 0), (1, 0.0, 2, 0), (2, 3.0, 1, 0)])
    expected = of_batch([(0.0, 0, 1), (1.0, 0, 3), (0.0, 7, 2), (0.0, 7, 2), (3.0, 7, 1)], "token-normalised")
    found = advantages_of(groups, "token-normalised")
    assert found == pytest.approx([*expected[:2], expected[1], *expected[2:]])
    assert advantages_of(groups, "token-normalised", "shared")[1:3] == pytest.approx([expected[1] / 2] * 2)


@pytest.mark.parametrize("mode", [*MODES, *OVER_BATCH])
def test_large_rewards_that_differ_stay_different(mode):
    large = groups_of([(0, 1e8, 2, 0), (1, 1e8 + 1, 2, 0)], [(0, 1e8, 2, 0), (1, 1e8 + 3, 2, 0)])
    small = groups_of([(0, 0.0, 2, 0), (1, 1.0, 2, 0)], [(0, 0.0, 2, 0), (1, 3.0, 2, 0)])
    assert advantages_of(large, mode) == pytest.approx(advantages_of(small, mode))


@pytest.mark.parametrize("mode", [*MODES, *OVER_BATCH])
def test_penalties_of_all_branches_are_taken_off_the_episodes_reward(mode):
    groups = groups_of([(0, 1.0, 1, 0), (1, 1.0, 1, 0), (1, 1.0, 2, 1)], [(0, 0.0, 2, 0), (1, 2.0, 2, 0)])
    less = groups_of([(0, 0.75, 1, 0), (1, 1.25, 1, 0), (1, 1.25, 2, 1)], [(0, 0.0, 2, 0), (1, 1.5, 2, 0)])
    assert advantages_of(groups, mode, penalties=[0.25, 0.5, -0.75, 0.0, 0.5]) == pytest.approx(advantages_of(less, mode))
