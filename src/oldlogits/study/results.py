"""What the cells of a study measured, as data: the content of ``study.json``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One evaluation during a run.

    Args:
        update: Versions made by then.
        cpu_s: CPU seconds of training by then: sampling, scoring and steps, without evaluation.
        success: Held-out success of sampled episodes.
    """

    update: int
    cpu_s: float
    success: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningRun:
    """One training run of the learning study.

    Args:
        regime: Name of the regime.
        method: Name of the method.
        block: Number of the block: runs of one block share the warm start and the RL seed.
        seed: Of warm start and RL.
        band: The band; of no effect where the method has none.
        eps_low: Of the clip.
        eps_high: Of the clip.
        success: Final held-out success of sampled episodes.
        num_episodes: That it is the mean of.
        num_updates: Versions made.
        rho: Mean over updates of the share of tokens left active.
        cpu_s: CPU seconds of training: sampling, scoring and steps, without evaluation.
        num_resets: Resets of the weight average.
        curve: Evaluations during the run, ascending; the last is the final one.
        error: Why the run ended early; empty: it did not. Its success then counts as that of its last evaluation.
    """

    regime: str
    method: str
    block: int
    seed: int
    band: float
    eps_low: float
    eps_high: float
    success: float
    num_episodes: int
    num_updates: int
    rho: float
    cpu_s: float
    num_resets: int
    curve: tuple[Point, ...]
    error: str = ""
