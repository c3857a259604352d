"""What a backend supplies to the one loop: engine, trainer, a way to run environments, and a clock."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from oldlogits.config.episodes import EnvConfig, RolloutConfig
from oldlogits.config.guard import Caution
from oldlogits.config.systems import LockstepConfig, RayConfig, RuntimeConfig
from oldlogits.core.engine import EngineKind, EngineSpec, RolloutEngine, ServerOptions
from oldlogits.core.engine_stats import Incident
from oldlogits.core.environment import Environment
from oldlogits.core.scoring import DedicatedScorer
from oldlogits.rollout.asked import EnvironmentRunner
from oldlogits.rollout.buffer import Buffer
from oldlogits.train.calls import TrainerCalls
from oldlogits.train.spec import ScorerSpec, TrainerSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendSpec:
    """What a backend is told: what its parts are told, and the sections of the recipe that say how they run.

    Args:
        model_folder: The Hugging Face folder that the run starts from.
        probe_ids: Fixed tokens on which engine and trainer are compared.
        folder: The run folder; servers leave their messages there.
        scorer: The dedicated scorer's part; None: the source needs none.
        sampler: The engine's part.
    """

    model_folder: Path
    probe_ids: tuple[int, ...]
    folder: Path
    trainer: TrainerSpec
    scorer: ScorerSpec | None
    engine: EngineKind
    sampler: EngineSpec
    servers: ServerOptions
    env: EnvConfig
    rollout: RolloutConfig
    runtime: RuntimeConfig
    lockstep: LockstepConfig
    ray: RayConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """What the loop works with.

    Args:
        engine: The engine, which samples.
        trainer: The trainer, which trains and scores.
        run_environment: Runs environment code.
        scorer: A second model that only scores; None: the source needs none.
        workers: Tasks that must not end while the run goes on; their errors end it.
        real_time: Whether the starts of groups may be spread over time.
        clock: The time in seconds since some fixed point; only for what is recorded as wall-clock time.
        watch: Takes the run's buffer; a backend that controls the lags reads the order of training from it.
        listen: Takes a function that is told what happens to servers, and what a reader of the results should know.
        begin_again: Lets the engine sample as one that was made with a seed, once nobody waits for it; None where time is real.
        host_environment: The class whose instances the episodes use; another one where environments live in other processes.
    """

    engine: RolloutEngine
    trainer: TrainerCalls
    run_environment: EnvironmentRunner
    scorer: DedicatedScorer | None = None
    workers: Sequence[asyncio.Task[None]] = ()
    real_time: bool = True
    clock: Callable[[], float] = time.perf_counter
    watch: Callable[[Buffer], None] = lambda buffer: None
    listen: Callable[[Callable[[Incident | Caution], None]], None] = lambda hear: None
    begin_again: Callable[[int], None] | None = None
    host_environment: Callable[[type[Environment]], type[Environment]] = lambda environment_class: environment_class
