"""Rescore on its own: the proximal policy and the measured condition, against scalar oracles."""

import asyncio
import math
from statistics import correlation as pearson

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oldlogits.core.policies import OLD, PROXIMAL_PROVENANCE, RESCORE, Provenance
from oldlogits.core.scoring import BatchTokens, EngineScores
from oldlogits.core.source import SourceHandles
from oldlogits.sources import check_scored
from oldlogits.sources.rescore import RescoreSource

TRAINER_VERSION = 6
LIVE = [0.5, -1.0, 0.25, 2.0]


class FakeTrainer:
    """Log-probs and noise as given."""

    def __init__(self, live, engine, mu, noise):
        self.live, self.engine, self.mu, self.calls = np.float32(live), np.float32(engine), np.float32(mu), []
        self.noise = {version: np.float32(values) for version, values in noise.items()}

    async def score(self, tokens, at):
        self.calls.append(("score", at, tokens.tolist()))
        return self.live[tokens]

    async def score_engine(self, tokens):
        self.calls.append(("score_engine", tokens.tolist()))
        return EngineScores(logp_mu=self.mu[tokens], values=self.engine[tokens], noise=self.noise)


def acquire(found, noise=None):
    """`found`: (lag, log pi_t, log q_t, log mu_old) of each token."""
    lags, live, engine, mu = zip(*found, strict=True)
    tags = TRAINER_VERSION - np.array(lags, np.int64)
    noise = noise or dict.fromkeys(range(TRAINER_VERSION + 1), LIVE)
    trainer = FakeTrainer(live, engine, mu, noise)
    source = RescoreSource(SourceHandles(trainer=trainer))
    batch = BatchTokens(versions=tags, trajectory_ids=("g0.0",), trainer_version=TRAINER_VERSION)
    scored = asyncio.run(source.acquire(batch))
    check_scored(scored, tags)
    return scored, source.metrics(), trainer


logp = st.floats(-20, 0, width=32)
tokens = st.lists(st.tuples(st.integers(0, TRAINER_VERSION), logp, logp, logp), min_size=1, max_size=20)


@pytest.mark.slow
@given(tokens)
def test_the_proximal_policy_is_mu_less_the_engines_noise_at_the_live_weights(found):
    scored, _, trainer = acquire(found)
    assert scored.policy is RESCORE
    expected = [mu + pi - q for _, pi, q, mu in found]
    assert scored.values.dtype == np.float32
    np.testing.assert_allclose(scored.values, expected, rtol=0, atol=1e-5)
    assert scored.computed_at.tolist() == [TRAINER_VERSION] * len(found)
    everything = list(range(len(found)))
    assert trainer.calls == [("score", None, everything), ("score_engine", everything)]


@pytest.mark.slow
@given(tokens, st.floats(-1, 1, width=32))
def test_it_is_old_where_the_noise_is_the_same_at_both_versions(found, noise):
    same = [(lag, live, live + noise, old + noise) for lag, live, _, old in found]
    scored, _, _ = acquire(same)
    np.testing.assert_allclose(scored.values, [old for _, _, _, old in found], rtol=0, atol=1e-5)


@pytest.mark.slow
@given(tokens)
def test_without_noise_it_is_mu_and_there_is_no_correlation_to_report(found):
    scored, metrics, _ = acquire([(lag, live, live, mu) for lag, live, _, mu in found], dict.fromkeys(range(7), [0.0] * 3))
    assert scored.values.tolist() == [mu for _, _, _, mu in found]
    assert metrics == {}


def test_it_is_never_labelled_exact():
    scored, _, _ = acquire([(0, -1.0, -1.5, -1.5)])
    assert scored.policy is not OLD
    assert (scored.provenance, PROXIMAL_PROVENANCE[scored.policy]) == (None, Provenance.RESCORE)


@pytest.mark.slow
@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(0, 1000))
def test_the_correlation_is_pearsons_with_the_present_noise_weighted_by_the_tokens_lags(lags, seed):
    noise = {TRAINER_VERSION - lag: row for lag, row in enumerate(np.random.default_rng(seed).normal(0.1, 1, (4, 12)))}
    noise = {version: np.float32(row).tolist() for version, row in noise.items()}
    _, metrics, _ = acquire([(lag, -1.0, -1.0, -1.0) for lag in lags], noise)
    of_tokens = [pearson(noise[TRAINER_VERSION - lag], noise[TRAINER_VERSION]) for lag in lags]
    assert metrics["source/noise_correlation"] == pytest.approx(math.fsum(of_tokens) / len(lags), abs=1e-9)
    assert metrics["source/noise_correlation_min"] == pytest.approx(min(of_tokens), abs=1e-9)


@given(st.floats(-0.95, 0.95))
def test_it_beats_mu_exactly_where_noise_of_equal_size_correlates_by_more_than_one_half(c):
    """Two orthogonal patterns of equal size make noise of any correlation; errors are measured on the probe itself."""
    now, other = np.array([1.0, -1.0, 1.0, -1.0]), np.array([1.0, 1.0, -1.0, -1.0])
    then = c * now + math.sqrt(1 - c * c) * other
    old = [-3.0, -4.0, -5.0, -6.0]
    found = [(2, -2.0, -2.0 + now[i], old[i] + then[i]) for i in range(4)]
    scored, metrics, _ = acquire(found, {TRAINER_VERSION: now, TRAINER_VERSION - 2: then})
    assert metrics["source/noise_correlation"] == pytest.approx(c, abs=1e-6)
    error = float(((scored.values - old) ** 2).mean())
    error_of_mu = float(((np.array([mu for *_, mu in found]) - old) ** 2).mean())
    assert error == pytest.approx(2 * (1 - c), abs=1e-4)
    assert (error < error_of_mu) == (c > 0.5) or abs(c - 0.5) < 1e-3
