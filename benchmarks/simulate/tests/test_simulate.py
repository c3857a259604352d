"""The simulation: virtual time, the engine's steps against arithmetic, the staleness bound, and what each route costs."""

from __future__ import annotations

import asyncio
import math
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.simulate.clock import run_virtually
from benchmarks.simulate.engine import Cached, Engine
from benchmarks.simulate.forecast import forecast, summarise
from benchmarks.simulate.scenario import (
    DrawnWorkload,
    EngineTimes,
    Episode,
    MeasuredWorkload,
    Scenario,
    ScorerTimes,
    TrainerTimes,
    Turn,
)
from benchmarks.simulate.world import simulate
from oldlogits.core.errors import AccountingError
from oldlogits.core.source import SOURCES
from oldlogits.rollout.admission import pace_of

EPISODE: Episode = (Turn(num_read=100, num_sampled=20), Turn(num_read=30, num_sampled=10))
SCENARIO = Scenario(
    name="test",
    route="snapshot",
    workload=MeasuredWorkload(groups=((EPISODE, EPISODE),)),
    engine=EngineTimes(step_s=0.01, sequence_s=0.001, prefill_s=0.0001),
    trainer=TrainerTimes(read_s=1e-4, token_s=1e-3, publish_s=0.1, checkout_s=0.01),
    scorer=ScorerTimes(read_s=1e-4),
    max_num_seqs=16,
    load_s=0.2,
    group_size=2,
    prompts_per_update=4,
    max_staleness=2,
    num_updates=12,
    skip=3,
)
HEAVY = DrawnWorkload(
    prompt_tokens=200, turns=3, sampled_tokens=20, read_tokens=20, gap_s=0.3, gap_variation=3, common_tokens=9
)


def cached(num_tokens: int = 10) -> Cached:
    return Cached(group_id="g", num_prompt=num_tokens, num_tokens=num_tokens)


def engine(times: EngineTimes, *, max_num_seqs: int = 4, recompute: bool = True) -> Engine:
    return Engine(times, max_num_seqs=max_num_seqs, recompute=recompute, common_tokens=0)


def test_virtual_time_jumps_and_nothing_waits() -> None:
    async def main() -> float:
        await asyncio.gather(asyncio.sleep(3600), asyncio.sleep(7200))
        return asyncio.get_running_loop().time()

    assert run_virtually(main()) == pytest.approx(7200)


def test_a_simulation_that_stands_still_says_so() -> None:
    async def main() -> None:
        await asyncio.Event().wait()

    with pytest.raises(AccountingError, match="stands still"):
        run_virtually(main())


def test_sequences_decode_side_by_side_in_steps_that_grow_with_them() -> None:
    """10 + 10 read: 0.02 s; 3 steps of two, then 2 of one: 3 x 0.014 + 2 x 0.012. A third waits for a slot."""

    async def main() -> list[float]:
        one, clock = (
            engine(EngineTimes(step_s=0.01, sequence_s=0.002, prefill_s=0.001), max_num_seqs=2),
            asyncio.get_running_loop(),
        )
        ends: list[float] = []

        async def ask(num: int, group: str) -> None:
            spans = await one.generate(group, Cached(group_id=group, num_prompt=10, num_tokens=10), num)
            assert spans == [(0, num)]
            ends.append(clock.time())

        one.pause()  # so that both are there when it begins
        tasks = [asyncio.create_task(ask(num, f"g{num}")) for num in (3, 5)]
        await asyncio.sleep(0)
        one.resume()
        await asyncio.gather(*tasks)
        assert one.busy_s == pytest.approx(ends[-1])
        assert (one.num_steps, one.num_decoded, one.num_prefilled) == (5, 8, 20)
        return ends

    assert run_virtually(main()) == pytest.approx([0.02 + 3 * 0.014, 0.02 + 3 * 0.014 + 2 * 0.012])


def test_a_request_joins_at_the_end_of_the_step_under_way() -> None:
    async def main() -> float:
        one, loop = engine(EngineTimes(step_s=1.0)), asyncio.get_running_loop()
        first = one.generate("a", cached(0), 10)
        await asyncio.sleep(2.5)
        assert await one.generate("b", cached(0), 2) == [(0, 2)]
        at = loop.time()
        await first
        assert loop.time() == pytest.approx(10)
        return at

    assert run_virtually(main()) == pytest.approx(5.0)


@pytest.mark.parametrize("recompute", [True, False])
def test_an_update_splits_a_turn_into_versions_and_may_empty_the_cache(recompute: bool) -> None:
    async def main() -> int:
        one = engine(EngineTimes(step_s=1.0), recompute=recompute)
        turn = one.generate("a", cached(50), 10)
        await asyncio.sleep(4)
        one.pause()
        assert list(one.partials()) == [("a", [(0, 4)])]
        one.update(1)
        one.resume()
        assert await turn == [(0, 4), (1, 6)]
        return one.num_prefilled

    assert run_virtually(main()) == (50 + 54 if recompute else 50)


def test_a_group_reads_its_prompt_once_and_a_later_turn_only_what_is_new() -> None:
    async def main() -> int:
        one = engine(EngineTimes(step_s=1.0))
        first, second = cached(50), cached(50)
        await one.generate("a", first, 3)
        await one.generate("b", second, 3)
        assert one.num_prefilled == 50
        first.num_tokens += 7
        await one.generate("a", first, 3)
        return one.num_prefilled

    assert run_virtually(main()) == 57


def test_a_synchronous_run_takes_what_its_parts_take() -> None:
    """W = 0: 8 episodes decode side by side, then the trainer works; nothing overlaps."""
    scenario = replace(SCENARIO, max_staleness=0, stops=True, recompute=True, prompts_per_update=4)
    updates = simulate(scenario)
    update = updates[5]
    num_tokens = 8 * 160
    trainer_s = num_tokens * 1e-4 + 0.01 + num_tokens * 1e-3 + 0.1
    assert update.score_s == pytest.approx(num_tokens * 1e-4 + 0.01)
    assert update.work.trainer_busy_s == pytest.approx(trainer_s)
    assert update.wall_s == pytest.approx(update.wait_s + trainer_s + 0.2)
    assert update.staleness == {0: 8 * 30}
    # The first group starts at the pace of the update before, the others once it has: a step of two and 30 of about eight.
    pace_s = pace_of(trainer_s + 0.2, 4)
    assert update.wait_s == pytest.approx(pace_s + 0.012 + 30 * 0.018 + 1e-4 * (4 * 100 + 8 * 30), rel=0.01)
    assert update.num_versions == 1


@pytest.mark.parametrize("route", sorted(SOURCES.names))
def test_every_route_runs_within_the_bound_and_loses_nothing(route: str) -> None:
    scenario = replace(SCENARIO, route=route, workload=HEAVY, filtered_share=0.2, stops=True)
    updates = simulate(scenario)
    assert [u.version for u in updates] == list(range(1, 13))
    assert all(u.num_trajectories == 8 for u in updates)
    assert all(0 <= lag <= 2 for u in updates for lag in u.staleness)
    passes = {"arrival": 1, "ewma": 1, "aged": 2, "rescore": 2, "none": 0}
    reads = summarise(updates, 1).reads_per_token
    assert reads == pytest.approx(passes[route]) if route in passes else reads >= 1


@settings(max_examples=25)
@given(
    max_staleness=st.integers(0, 4),
    groups=st.integers(1, 6),
    running=st.integers(0, 5),
    engines=st.integers(1, 3),
    slots=st.integers(1, 12),
    speed=st.floats(0.01, 100),
    route=st.sampled_from(["snapshot", "eager", "interruption", "dedicated"]),
)
@pytest.mark.slow
def test_no_token_is_beyond_the_bound_however_fast_engine_and_trainer_are(
    max_staleness: int, groups: int, running: int, engines: int, slots: int, speed: float, route: str
) -> None:
    scenario = replace(
        SCENARIO,
        route=route,
        workload=HEAVY,
        max_staleness=max_staleness,
        prompts_per_update=groups,
        max_running_groups=running,
        num_engines=engines,
        max_num_seqs=slots,
        engine=EngineTimes(step_s=0.002 * speed),
        num_updates=6,
    )
    updates = simulate(scenario)
    assert max(lag for u in updates for lag in u.staleness) <= max_staleness
    assert all(u.num_versions <= max_staleness + 2 for u in updates)


def test_the_same_scenario_gives_the_same_updates() -> None:
    scenario = replace(SCENARIO, workload=HEAVY, route="eager")
    assert simulate(scenario) == simulate(scenario)
    assert simulate(scenario) != simulate(replace(scenario, seed=1))


def test_only_interruption_makes_the_engine_wait_for_scores_and_steps() -> None:
    stalls = {route: forecast(replace(SCENARIO, route=route)).stall_s for route in ("snapshot", "eager", "interruption")}
    assert stalls["snapshot"] == pytest.approx(0.2)
    assert stalls["eager"] == pytest.approx(0.2)
    assert stalls["interruption"] > 0.2 + 8 * 160 * 1e-3


def test_a_dedicated_scorer_takes_its_work_out_of_the_update() -> None:
    slow = replace(SCENARIO, trainer=replace(SCENARIO.trainer, read_s=1e-3))
    snapshot, dedicated = (forecast(replace(slow, route=route)) for route in ("snapshot", "dedicated"))
    assert dedicated.score_share < 0.2 * snapshot.score_share
    assert dedicated.trajectories_per_s > snapshot.trajectories_per_s


def test_measured_gaps_have_the_distribution_that_their_quantiles_say() -> None:
    """Quantiles on a line through 0 are those of an exponential distribution, up to the last."""
    workload = MeasuredWorkload(groups=((EPISODE,),), gaps_s={"gap": ((0.0, 0.0), (20.0, 40.0))})
    rng = random.Random(0)
    drawn = [workload.draw_gap_s("gap", rng) for _ in range(20_000)]
    assert sum(drawn) / len(drawn) == pytest.approx(2.0, rel=0.03)
    assert sum(gap > 4 for gap in drawn) / len(drawn) == pytest.approx(math.exp(-2), rel=0.06)
    assert workload.draw_gap_s("first", rng) == 0


def test_drawn_sizes_have_the_given_mean() -> None:
    workload = DrawnWorkload(turns=6, max_turns=1000, max_tokens=10**9, sampled_tokens=100, read_tokens=50)
    rng = random.Random(0)
    episodes = [e for _ in range(500) for e in workload.draw_group(8, rng)]
    turns = [turn for episode in episodes for turn in episode]
    assert len(turns) / len(episodes) == pytest.approx(6, rel=0.05)
    assert sum(turn.num_sampled for turn in turns) / len(turns) == pytest.approx(100, rel=0.05)
    assert all(episode[0].num_read == workload.prompt_tokens for episode in episodes)
