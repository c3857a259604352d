"""The two sources over an average: what they ask the trainer for, and what they make of it."""

import asyncio

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oldlogits.core.policies import AGED, EWMA, Provenance
from oldlogits.core.scoring import AverageScores, BatchTokens
from oldlogits.core.source import SourceHandles
from oldlogits.sources import check_scored
from oldlogits.sources.aged import AgedSource
from oldlogits.sources.ewma import EwmaSource

logps = st.floats(-20, 0, width=32)
tokens = st.lists(st.tuples(st.integers(0, 8), logps, logps), min_size=1, max_size=20)


class FakeTrainer:
    """Live and averaged log-probs as given, and an average of that age."""

    def __init__(self, live, averaged, age):
        self.live, self.averaged, self.age, self.calls = np.float32(live), np.float32(averaged), age, []

    async def score(self, tokens, at):
        self.calls.append(("score", at, tokens.tolist()))
        return self.live[tokens]

    async def score_average(self, tokens):
        self.calls.append(("average", tokens.tolist()))
        return AverageScores(values=self.averaged[tokens], age=self.age)


def acquire(source_type, found, age, trainer_version=8):
    """`found`: (lag, live log-prob, averaged log-prob) of each token."""
    lags, live, averaged = zip(*found, strict=True)
    trainer = FakeTrainer(live, averaged, age)
    tags = trainer_version - np.array(lags)
    batch = BatchTokens(versions=tags, trajectory_ids=("g0.0",), trainer_version=trainer_version)
    scored = asyncio.run(source_type(SourceHandles(trainer=trainer)).acquire(batch))
    check_scored(scored, tags)
    assert scored.values.dtype == np.float32
    assert set(scored.computed_at.tolist()) == {trainer_version}
    return scored, trainer


@pytest.mark.slow
@given(tokens, st.floats(0, 9))
def test_ewma_scores_the_whole_batch_once_with_the_average_and_says_so(found, age):
    scored, trainer = acquire(EwmaSource, found, age)
    assert (scored.policy, scored.provenance) == (EWMA, None)
    assert scored.values.tolist() == [averaged for _, _, averaged in found]
    assert trainer.calls == [("average", list(range(len(found))))]


@pytest.mark.slow
@given(tokens, st.floats(0.5, 9))
def test_aged_goes_from_the_live_weights_through_the_average_to_each_tokens_lag_at_most_twice_as_far(found, age):
    scored, _ = acquire(AgedSource, found, age)
    assert (scored.policy, scored.provenance) == (AGED, None)
    expected = [live + min(lag / age, 2) * (averaged - live) for lag, live, averaged in found]
    np.testing.assert_allclose(scored.values, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.slow
@given(st.lists(st.tuples(st.integers(0, 6), st.floats(-3, 0), st.floats(-0.2, 0.2)), min_size=1, max_size=9), st.floats(3, 9))
def test_aged_is_old_where_log_probs_move_at_constant_speed(found, age):
    drifting = [(lag, live, live - age * speed) for lag, live, speed in found]
    scored, _ = acquire(AgedSource, drifting, age)
    old = [live - lag * speed for lag, live, speed in found]
    np.testing.assert_allclose(scored.values, old, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@given(tokens, st.floats(0, 0.49))
def test_with_a_young_average_aged_is_the_arrival_weights_and_labelled_so(found, age):
    scored, trainer = acquire(AgedSource, found, age)
    assert (scored.policy, scored.provenance) == (AGED, Provenance.ASYNC)
    assert scored.values.tolist() == [live for _, live, _ in found]
    assert ("score", None, list(range(len(found)))) in trainer.calls


@pytest.mark.parametrize("age, provenance", [(0.49999, Provenance.ASYNC), (0.5, None)])
def test_the_age_that_is_enough_is_half_a_version(age, provenance):
    assert acquire(AgedSource, [(1, -1.0, -2.0)], age)[0].provenance is provenance
