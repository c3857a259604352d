import asyncio
import dataclasses
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oldlogits.core.errors import ExactnessError, MissingLogprobError, VersionEvictedError
from oldlogits.core.policies import ASYNC, OLD
from oldlogits.core.scoring import AverageScores, BatchTokens, EngineScores, Scored
from oldlogits.core.source import SOURCES, SourceHandles
from oldlogits.sources import check_scored, make_source
from oldlogits.sources.arrival import ArrivalSource
from oldlogits.sources.snapshot import SnapshotSource

LIVE = 1000


def entering(tags, trainer_version=9):
    """A batch of one trajectory."""
    return BatchTokens(versions=np.asarray(tags, np.int64), trajectory_ids=("g0.0",), trainer_version=trainer_version)


class FakeTrainer:
    """Answers ``1000 * version + position``, and remembers what it was asked."""

    def __init__(self, held=range(100)):
        self.held, self.calls = held, []

    async def score(self, tokens, at):
        assert tokens.dtype == np.int64
        assert (np.diff(tokens) > 0).all()
        if at is not None and at not in self.held:
            raise VersionEvictedError(f"version {at} is not in the store")
        assert at is None or type(at) is int, "a plain number, for any handle"
        self.calls.append((at, tokens.tolist()))
        return (1000 * (LIVE if at is None else at) + tokens).astype(np.float32)

    async def score_average(self, tokens):
        return AverageScores(values=tokens.astype(np.float32), age=1.0)

    async def score_engine(self, tokens):
        values = tokens.astype(np.float32)
        return EngineScores(logp_mu=values, values=values, noise={0: np.zeros(1, np.float32)})


class FakeScorer:
    window = 2


versions = st.lists(st.integers(0, 6), min_size=1, max_size=30).map(lambda v: np.array(v, np.int64))


@pytest.mark.slow
@given(versions)
def test_snapshot_scores_every_token_at_its_own_version_and_never_at_another(tags):
    trainer = FakeTrainer()
    scored = asyncio.run(SnapshotSource(SourceHandles(trainer=trainer)).acquire(entering(tags)))
    assert scored.policy is OLD
    assert scored.values.tolist() == [1000 * v + i for i, v in enumerate(tags.tolist())]
    assert scored.values.dtype == np.float32
    assert scored.computed_at.tolist() == tags.tolist()
    check_scored(scored, tags)


@given(versions)
def test_snapshot_switches_once_per_distinct_version_in_ascending_order(tags):
    trainer = FakeTrainer()
    scored = asyncio.run(SnapshotSource(SourceHandles(trainer=trainer)).acquire(entering(tags)))
    assert [at for at, _ in trainer.calls] == sorted(set(tags.tolist()))
    assert scored.num_switches == len(set(tags.tolist()))


@pytest.mark.slow
@given(versions)
def test_snapshot_leaves_a_batch_over_stale_entries_to_the_mixed_version_forward(tags):
    class MixingTrainer(FakeTrainer):
        async def score_mixed(self):
            self.calls.append("mixed")
            return np.arange(len(tags), dtype=np.float32), np.array(computed_at)

    computed_at = tags
    trainer, entering_mixed = MixingTrainer(), dataclasses.replace(entering(tags), has_mixed_kv=True)
    scored = asyncio.run(SnapshotSource(SourceHandles(trainer=trainer)).acquire(entering_mixed))
    assert trainer.calls == ["mixed"]
    assert scored.policy is OLD
    assert scored.values.tolist() == list(range(len(tags)))
    assert scored.num_switches == len(set(tags.tolist()))
    check_scored(scored, tags)
    for told, error in ((-1, MissingLogprobError), (tags[-1] + 1, ExactnessError)):
        computed_at = [*tags[:-1], told]
        with pytest.raises(error):
            check_scored(asyncio.run(SnapshotSource(SourceHandles(trainer=trainer)).acquire(entering_mixed)), tags)


def test_snapshot_does_not_stand_in_for_a_version_that_is_gone():
    with pytest.raises(VersionEvictedError, match="version 2"):
        asyncio.run(SnapshotSource(SourceHandles(trainer=FakeTrainer(held={1, 3}))).acquire(entering([1, 2, 3])))


@pytest.mark.slow
@given(versions, st.integers(0, 20))
def test_arrival_scores_the_whole_batch_once_with_the_live_weights(tags, trainer_version):
    trainer = FakeTrainer()
    scored = asyncio.run(ArrivalSource(SourceHandles(trainer=trainer)).acquire(entering(tags, trainer_version)))
    assert scored.policy is ASYNC
    assert trainer.calls == [(None, list(range(len(tags))))]
    assert scored.values.tolist() == [1000 * LIVE + i for i in range(len(tags))]
    assert scored.computed_at.tolist() == [trainer_version] * len(tags)
    assert scored.num_switches == 0
    check_scored(scored, tags)


TABLE = {  # provides, stores versions, the most of them with a window of 4, needs a scorer, an average, a pause, partials
    "snapshot": ("old", True, 6, False, False, False, False),
    "dedicated": ("old", True, 6, True, False, False, True),
    "interruption": ("old", False, 0, False, False, True, True),
    "eager": ("old", True, 2, False, False, False, True),
    "arrival": ("async", False, 0, False, False, False, False),
    "ewma": ("ewma", False, 0, False, True, False, False),
    "aged": ("aged", False, 0, False, True, False, False),
    "rescore": ("rescore", False, 0, False, False, False, False),
    "balance": ("balance", True, 6, False, False, False, False),
    "none": ("mu", False, 0, False, False, False, False),
}


def test_what_differs_between_the_built_in_sources_is_an_attribute_of_their_classes():
    assert SOURCES.names == tuple(TABLE)
    for name, expected in TABLE.items():
        s = SOURCES.find(name)
        needs = (s.needs_scorer, s.keeps_average, s.needs_pause, s.needs_partials)
        assert (s.provides.value, s.stores_versions, s.most_stored(4), *needs) == expected, name
        assert s.mixes_versions is (name == "snapshot")
        assert s.cost
        assert isinstance(make_source(name, FakeTrainer(), FakeScorer()), s)


def test_the_attributes_of_the_built_in_sources_are_read_without_torch():
    code = (
        "import sys; from oldlogits.core.source import SOURCES; print([SOURCES.find(n).cost for n in SOURCES.names]);"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["snapshot", "arrival", "ewma", "aged", "rescore"])
def test_what_a_source_returns_is_of_the_policy_that_it_says_it_provides(name):
    source = make_source(name, FakeTrainer(), None)
    assert asyncio.run(source.acquire(entering([0], 0))).policy is source.provides


def test_the_source_none_returns_nothing_and_asks_for_nothing():
    assert asyncio.run(make_source("none", None, None).acquire(entering([0], 0))) is None


TAGS = np.array([3, 4, 4])
GOOD = Scored(policy=OLD, values=np.float32([-1, -2, -3]), computed_at=TAGS, num_switches=2)


def test_old_at_another_version_is_refused_with_how_many_tokens():
    with pytest.raises(ExactnessError, match="got: 2 of 3 tokens"):
        check_scored(dataclasses.replace(GOOD, computed_at=np.array([3, 3, 5])), TAGS)


def test_another_policy_than_old_may_be_computed_at_any_version():
    check_scored(dataclasses.replace(GOOD, policy=ASYNC, computed_at=np.array([5, 5, 5])), TAGS)


@pytest.mark.parametrize("policy", [OLD, ASYNC])
@pytest.mark.parametrize(
    "values, computed_at, found",
    [([-1.0, -2.0], [3, 4], 2), ([-1.0, -2.0, -3.0], [3, -1, -1], 1), ([], [], 0), ([-1.0, -2.0, -3.0, -4.0], [3, 4, 4, 4], 4)],
)
def test_tokens_without_a_log_prob_are_refused(policy, values, computed_at, found):
    scored = Scored(policy=policy, values=np.float32(values), computed_at=np.array(computed_at, int), num_switches=1)
    with pytest.raises(
        MissingLogprobError, match=f"source of {policy.name} left tokens unscored; got: {found} of 3 loss tokens"
    ):
        check_scored(scored, TAGS)


def test_a_log_prob_without_the_version_that_computed_it_is_refused():
    with pytest.raises(MissingLogprobError):
        check_scored(dataclasses.replace(GOOD, computed_at=TAGS[:2]), TAGS)


def test_a_non_finite_log_prob_is_passed_on_to_be_counted():
    check_scored(dataclasses.replace(GOOD, values=np.float32([np.nan, -np.inf, -1])), TAGS)
