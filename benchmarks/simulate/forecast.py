"""What came out of simulated updates, as the figures that a run has: throughput, idle shares, staleness, shares of the step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from statistics import fmean

from benchmarks.simulate.scenario import Scenario
from benchmarks.simulate.world import Update, simulate


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Figures over the updates of a run, its first ones left out.

    Args:
        trajectories_per_s: Trained, over the time of all updates and what lies between them.
        tokens_per_s: Trained, context included, over the same time.
        sampled_per_s: Sampled by the engines, over the time of the updates.
        engine_idle_share: Share of the engines' time in the updates in which they had nothing to do.
        trainer_idle_share: Share of the time of the updates in which the trainer did not work.
        scorer_idle_share: The same of the dedicated scorer; 1 where there is none.
        staleness_mean: Over trained tokens, in versions.
        staleness_max: Over trained tokens.
        score_share: Share of the updates, without their wait for a batch, that waited for the route.
        stall_s: Seconds an update that the engines stood still.
        update_s: Seconds an update.
        wait_s: Seconds an update that it waited for its batch.
        reads_per_token: Tokens that scoring read, per trained token: forward passes over the batch.
        prefill_per_token: Prompt tokens that the engines computed, per sampled token.
        num_versions: Most versions to keep for tokens in flight, the live one included.
    """

    trajectories_per_s: float
    tokens_per_s: float
    sampled_per_s: float
    engine_idle_share: float
    trainer_idle_share: float
    scorer_idle_share: float
    staleness_mean: float
    staleness_max: float
    score_share: float
    stall_s: float
    update_s: float
    wait_s: float
    reads_per_token: float
    prefill_per_token: float
    num_versions: float


def summarise(updates: Sequence[Update], num_engines: int) -> Forecast:
    """The figures of these updates.

    Args:
        updates: At least one.
        num_engines: That worked.
    """
    n, wall_s = len(updates), sum(u.wall_s for u in updates)
    total_s = wall_s + sum(u.between_s for u in updates)
    wait_s = sum(u.wait_s for u in updates)
    lags = sum((Counter(u.staleness) for u in updates), Counter[int]())
    num_tokens, num_sampled = sum(u.num_tokens for u in updates), sum(lags.values())
    num_decoded = sum(u.work.num_decoded for u in updates)
    return Forecast(
        trajectories_per_s=sum(u.num_trajectories for u in updates) / total_s,
        tokens_per_s=num_tokens / total_s,
        sampled_per_s=num_decoded / wall_s,
        engine_idle_share=1 - sum(u.work.engine_busy_s for u in updates) / (num_engines * wall_s),
        trainer_idle_share=1 - sum(u.work.trainer_busy_s for u in updates) / wall_s,
        scorer_idle_share=1 - sum(u.work.scorer_busy_s for u in updates) / wall_s,
        staleness_mean=sum(lag * num for lag, num in lags.items()) / num_sampled,
        staleness_max=max(lags),
        score_share=sum(u.score_s for u in updates) / (wall_s - wait_s),
        stall_s=sum(u.stall_s for u in updates) / n,
        update_s=wall_s / n,
        wait_s=wait_s / n,
        reads_per_token=sum(u.work.num_read for u in updates) / num_tokens,
        prefill_per_token=sum(u.work.num_prefilled for u in updates) / max(1, num_decoded),
        num_versions=max(u.num_versions for u in updates),
    )


def forecast(scenario: Scenario) -> Forecast:
    """Simulate a scenario, and leave its first `skip` updates out."""
    return summarise(simulate(scenario)[scenario.skip :], scenario.num_engines)


def mean_of(forecasts: Sequence[Forecast]) -> Forecast:
    """Figure by figure: of the same scenario with several seeds."""
    return Forecast(**{f.name: fmean(getattr(one, f.name) for one in forecasts) for f in fields(Forecast)})
