"""One run of the learning study: train a recipe, and keep what the comparison needs."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

from oldlogits.config.schema import RunConfig
from oldlogits.core.errors import NonFiniteError
from oldlogits.record.bus import Event
from oldlogits.record.event_log import read_events, typed
from oldlogits.record.events import AverageWasReset, BatchTaken, Evaluated, Updated
from oldlogits.run.run import run
from studies.old_logits.measure.idle import idle_checks
from studies.old_logits.results import LearningRun, Point


def run_learning(config: RunConfig, folder: Path, *, regime: str, method: str, block: int) -> LearningRun:
    """Train once in this process.

    Args:
        config: Of runtime "lockstep"; its evaluations during the run are the curve.
        folder: The run folder.
        regime: Name of the regime.
        method: Name of the method.
        block: Number of the block.

    Returns:
        What was measured. A run that diverged counts with the success of its last evaluation, or 0.

    Raises:
        OldLogitsError: The run could not be started, or ended with an error other than divergence: no result.
        KeyboardInterrupt: It was interrupted.
    """
    cpu, wall = time.process_time(), time.perf_counter()
    result = run(config, folder)
    if result.summary.ended == "interrupted":
        raise KeyboardInterrupt
    if result.error is not None and not isinstance(result.error, NonFiniteError):
        raise result.error
    cpu_share = (time.process_time() - cpu) / (time.perf_counter() - wall)
    events = list(read_events(folder / "events.jsonl"))
    updates = typed(events, Updated)
    cpu_s = [0.0, *itertools.accumulate(update.metrics["time/update_s"] * cpu_share for update in updates)]
    curve = _curve(events, cpu_s)
    return LearningRun(
        regime=regime,
        method=method,
        block=block,
        seed=config.seed,
        band=config.fixed_band,
        eps_low=config.objective.eps_low,
        eps_high=config.objective.eps_high,
        success=curve[-1].success if curve else 0.0,
        num_episodes=config.eval.num_episodes_during,
        num_updates=len(updates),
        rho=result.summary.rho_mean or 0.0,
        cpu_s=cpu_s[-1],
        num_resets=len(typed(events, AverageWasReset)),
        curve=curve,
        error=str(result.error or ""),
        checks=idle_checks(config, folder, updates, typed(events, BatchTaken)) if config.record.tokens_every == 1 else None,
    )


def _curve(events: list[Event], cpu_s: list[float]) -> tuple[Point, ...]:
    """Held-out success by updates and by CPU seconds of training."""
    return tuple(
        Point(
            update=event.version,
            cpu_s=cpu_s[min(event.version, len(cpu_s) - 1)],
            success=event.mean,
        )
        for event in typed(events, Evaluated)
        if event.mode == "sampled"
    )
