import statistics
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oldlogits.core.errors import ConfigError

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
