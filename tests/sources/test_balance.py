"""Balance: the mixture against a scalar oracle, what multiple importance sampling promises of it, and whole runs."""

import asyncio
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oldlogits.core.errors import MissingLogprobError
from oldlogits.core.policies import BALANCE
from oldlogits.core.scoring import BatchTokens
from oldlogits.core.source import SourceHandles
from oldlogits.run.run import run
from oldlogits.sources import check_scored
from oldlogits.sources.balance import BalanceSource, balance_logp

from ..runs import check_accounting, recipe, summary_of, tokens_of


class FakeTrainer:
    """Gives log-probs by version, as told, and remembers what it was asked."""

    def __init__(self, by_version):
        self.by_version, self.calls = by_version, []

    async def score(self, tokens, at):
        self.calls.append((at, tokens.tolist()))
        return np.float32(self.by_version[at])[tokens]


def acquire(by_version, tags, mu):
    trainer = FakeTrainer(by_version)
    batch = BatchTokens(
        versions=np.array(tags, np.int64),
        trajectory_ids=("g0.0",),
        trainer_version=max(by_version),
        logp_mu=None if mu is None else np.float32(mu),
    )
    return asyncio.run(BalanceSource(SourceHandles(trainer=trainer)).acquire(batch)), trainer, batch


logps = st.floats(-20, -1e-3)
batches = st.lists(st.tuples(st.integers(0, 3), logps, logps, logps, logps, logps), min_size=1, max_size=12)


@given(batches)
def test_each_token_has_the_mixture_of_the_batchs_versions_with_the_engines_noise_at_its_own(batch):
    tags = [version for version, *_ in batch]
    by_version = {version: [token[1 + version] for token in batch] for version in range(4)}
    mu = [token[5] for token in batch]
    scored, trainer, entering = acquire(by_version, tags, mu)
    for i, own in enumerate(tags):
        mixture = sum(tags.count(v) / len(tags) * math.exp(by_version[v][i]) for v in set(tags))
        expected = math.log(mixture) + mu[i] - by_version[own][i]
        assert scored.values[i] == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert [at for at, _ in trainer.calls] == sorted(set(tags)), "no version that sampled nothing"
    assert all(tokens == list(range(len(tags))) for _, tokens in trainer.calls)
    assert scored.policy is BALANCE
    assert scored.values.dtype == np.float32
    check_scored(scored, entering.versions)


@given(st.lists(st.tuples(logps, logps), min_size=1, max_size=5))
def test_a_batch_of_one_version_gives_mu_itself(tokens):
    mu = np.float32([m for m, _ in tokens])
    scored, *_ = acquire({2: [old for _, old in tokens]}, [2] * len(tokens), mu)
    np.testing.assert_allclose(scored.values, mu, rtol=1e-6, atol=1e-6)


def test_a_token_that_no_other_version_can_sample_and_one_that_all_can():
    scored, *_ = acquire({0: [-math.inf, -1.0], 1: [-2.0, -1.0]}, [1, 0], [-2.0, -1.0])
    np.testing.assert_allclose(scored.values, [-2.0 + math.log(0.5), -1.0], rtol=1e-6)


def test_a_batch_without_mu_is_refused():
    with pytest.raises(MissingLogprobError, match="logp_mu"):
        acquire({0: [-1.0]}, [0], None)


distributions = st.lists(st.floats(0.01, 1), min_size=4, max_size=4).map(lambda p: np.array(p) / sum(p))


@given(st.lists(distributions, min_size=2, max_size=4), distributions, st.data())
def test_weights_over_the_mixture_are_unbiased_and_their_second_moment_is_not_above_that_of_single_ratios(
    versions, theta, data
):
    """Every outcome is enumerated, so that these are equalities of sums, with nothing sampled."""
    counts = np.array(data.draw(st.lists(st.integers(1, 9), min_size=len(versions), max_size=len(versions))))
    shares, scores = counts / counts.sum(), np.float32(np.log(versions))
    mean = second = single_second = 0.0
    for own, (share, pi) in enumerate(zip(shares, versions, strict=True)):
        mixture = np.exp(balance_logp(scores, counts, np.full(4, own), scores[own]).astype(np.float64))
        mean += share * float(np.sum(pi * (theta / mixture)))
        second += share * float(np.sum(pi * (theta / mixture) ** 2))
        single_second += share * float(np.sum(pi * (theta / pi) ** 2))
    assert mean == pytest.approx(1.0, rel=1e-5)
    assert second <= single_second * (1 + 1e-5)


MIS = {"variant": "mis_balance", "proximal": {"source": "balance"}}


@pytest.mark.slow
def test_a_run_stores_the_versions_that_it_needs_and_is_mu_where_nothing_is_stale(tmp_path, tiny_folder):
    fresh = recipe(tiny_folder, **MIS, lockstep={"max_lag": 0}, max_staleness=0)
    assert run(fresh, tmp_path / "fresh").error is None
    tokens = tokens_of(tmp_path / "fresh", "logp_mu", "logp_proximal", "staleness")
    assert np.abs(tokens["logp_mu"] - tokens["logp_proximal"]).max() < 1e-5

    assert run(recipe(tiny_folder, **MIS), tmp_path / "stale").error is None
    check_accounting(tmp_path / "stale")
    tokens = tokens_of(tmp_path / "stale", "logp_mu", "logp_proximal", "staleness", "provenance", "log_r_d")
    assert set(tokens["provenance"].tolist()) == {"balance"}
    assert summary_of(tmp_path / "stale")["provenance"] == {"balance": len(tokens["provenance"])}
    assert set(tokens["staleness"].tolist()) == {0, 1, 2}
    assert np.abs(tokens["logp_mu"] - tokens["logp_proximal"]).max() > 1e-3
    assert not tokens["log_r_d"].any(), "the ratio is one piece"
