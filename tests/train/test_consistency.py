"""What a consistency check judges: all tokens; with a mixture of experts, all but those that one tie can move."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oldlogits.train.consistency import is_routed, judged_error, num_excused

from ..engines.reference import MODELS, make_model


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_routed_where_it_has_experts(name):
    assert is_routed(make_model(name)) is ("experts" in name)


@pytest.mark.parametrize(
    ("lengths", "excused"),
    [
        ([], 0),
        ([1], 0),
        ([40], 20),  # one sequence: half of its tokens
        ([3, 40], 21),
        ([10, 30, 20], 30),  # one sequence of several: all of its tokens
        ([10] * 100, 10),
        ([10] * 250, 25),  # 1% of a large batch
    ],
)
def test_with_experts_one_sequence_or_one_percent_is_excused_but_never_more_than_half(lengths, excused):
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    assert num_excused(sequence, routed=True) == excused
    assert num_excused(sequence, routed=False) == 0


@given(st.lists(st.integers(1, 30), min_size=2, max_size=12), st.data())
def test_with_experts_a_tie_in_a_sequence_of_at_most_half_the_tokens_passes_and_weights_that_move_every_token_do_not(
    lengths, data
):
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    tied = data.draw(st.sampled_from(range(len(lengths))))
    errors = np.where(sequence == tied, np.float32(0.5), np.float32(1e-7))
    if 2 * lengths[tied] <= len(sequence):
        assert judged_error(errors, num_excused(sequence, routed=True)) == np.float32(1e-7)
    assert judged_error(errors, num_excused(sequence, routed=False)) == 0.5
    assert judged_error(np.full(len(sequence), 1e-3, np.float32), num_excused(sequence, routed=True)) == np.float32(1e-3)


def test_an_error_that_is_not_finite_is_never_excused_and_no_token_has_none():
    for bad in (math.inf, math.nan):
        errors = np.array([0.0, bad, 0.0, 0.0], np.float32)
        assert judged_error(errors, 2) == math.inf
    assert math.isnan(judged_error(errors[:0], 0))
