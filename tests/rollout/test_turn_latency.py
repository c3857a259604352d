"""Gaps of a trajectory: what begins and ends one, and the figures of an update."""

import pytest

from oldlogits.core.trajectory import Context, Sampled
from oldlogits.rollout.turn_latency import TurnLatency

READ = Context(token_ids=(1,))
SAID = Sampled(token_ids=(2,), logp_mu=(-1.0,), version=0, kv="fresh", temperature=1.0)


def test_what_is_not_the_engines_time_is_before_the_first_turn_between_turns_or_after_the_last() -> None:
    now = [0.0]
    gaps = TurnLatency(clock=lambda: now[0])
    gaps.started("a")
    grown = [(0.5, [READ]), (1.0, [READ, SAID]), (3.5, [READ, SAID, READ]), (4.0, [READ, SAID, READ, SAID])]
    for seconds, segments in grown:
        now[0] = seconds
        gaps.grew("a", segments)
    now[0] = 9.0
    gaps.ended("a", well=True)
    found = gaps.metrics()
    assert [found[f"turn/{kind}_s"] for kind in ("first", "gap", "last")] == pytest.approx([0.5, 2.5, 5.0])
    assert found["turn/num_gap"] == 1
    assert found["turn/gap_p50_s"] == found["turn/gap_max_s"] == pytest.approx(2.5)
    assert gaps.metrics() == {"turn/num_first": 0, "turn/num_gap": 0, "turn/num_last": 0}


def test_an_episode_that_failed_has_no_last_gap() -> None:
    gaps = TurnLatency()
    gaps.grew("a", [READ, SAID])
    gaps.ended("a", well=False)
    gaps.grew("a", [READ])
    assert gaps.metrics() == {"turn/num_first": 0, "turn/num_gap": 0, "turn/num_last": 0}
