"""Gaps between turns: what begins and ends one, and the figures of an update."""

import pytest

from oldlogits.core.trajectory import Context, Sampled
from oldlogits.runtime.gaps import TurnGaps

READ = Context(token_ids=(1,))
SAID = Sampled(token_ids=(2,), logp_mu=(-1.0,), version=0, kv="fresh", temperature=1.0)


def test_a_gap_runs_from_a_sampled_turn_to_the_context_that_follows_it() -> None:
    now = [0.0]
    gaps = TurnGaps(clock=lambda: now[0])
    gaps.grew("a", [READ])  # the prompt ends no gap
    for seconds, segments in ((1.0, [READ, SAID]), (3.5, [READ, SAID, READ]), (4.0, [READ, SAID, READ, SAID])):
        now[0] = seconds
        gaps.grew("a", segments)
    gaps.ended("a")
    now[0] = 9.0
    gaps.grew("a", [READ])
    found = gaps.metrics()
    assert found["turn/num_gaps"] == 1
    assert found["turn/gap_s"] == found["turn/gap_p50_s"] == found["turn/gap_max_s"] == pytest.approx(2.5)
    assert gaps.metrics() == {"turn/num_gaps": 0}
