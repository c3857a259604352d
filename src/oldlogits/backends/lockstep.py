"""Runtime "lockstep": one process, virtual time, the same run bit for bit from the same seed.

A driver task steps the engine whenever it can sample; everything else runs when the engine waits for it. Each training
trajectory follows a plan (backends/lag.py) of how many tokens it samples while it is ``lag`` versions from being
trained; `pause` returns when every trajectory has used up what its plan allows at this version.

    take(v) waits -> driver: step, step, ... -> groups end -> take returns -> train, publish
    pause: drive until nothing may sample at v -> update_weights -> new allowances at v + 1 -> resume
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

from oldlogits.backends.lag import Plan, draw_plan
from oldlogits.backends.torchrun.dispatch import open_trainer
from oldlogits.config import RunConfig
from oldlogits.core.engine import EngineCapabilities, Generation, Sampling, trajectory_of
from oldlogits.core.errors import AccountingError
from oldlogits.core.source import SOURCES
from oldlogits.core.weights import PolicyVersion, WeightUpdate
from oldlogits.engines.embedded.engine import EmbeddedEngine, EngineCore
from oldlogits.engines.spec import EngineSpec, EngineStats
from oldlogits.loop.backend import Backend, InlineScorer, inline_trainer
from oldlogits.rollout.buffer import Buffer
from oldlogits.rollout.environment_runner import run_inline
from oldlogits.train.scorer_model import ScorerModel

STALLED_ROUNDS = 100_000
"""Idle turns of the driver after which something must be wrong."""

SETTLE_ROUNDS = 8
"""Turns of the event loop after which every task that could go on has asked the engine again, or waits."""


class LockstepEngine:
    """The embedded engine under lag plans; a `RolloutEngine`.

    Args:
        engine: Samples.
        config: The lag distribution and the seed.
    """

    def __init__(self, engine: EmbeddedEngine, config: RunConfig) -> None:
        self._engine, self._config = engine, config
        self._plans: dict[str, Plan] = {}
        self._sampled: dict[str, int] = {}  # tokens at the current version, by trajectory
        self._running: dict[str, str] = {}  # request -> trajectory
        self._done_before: dict[str, int] = {}  # tokens that a running request sampled at earlier versions
        self._version = 0
        self._held: list[asyncio.Future[None]] = []  # trajectories that may not ask the engine at this version
        self._buffer: Buffer | None = None

    @property
    def capabilities(self) -> EngineCapabilities:
        """What this engine can do."""
        return self._engine.capabilities

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling, request_id: str) -> Generation:
        """Sample a completion, as far as the trajectory's plan allows at each version."""
        trajectory = trajectory_of(request_id)
        if self._group(trajectory) is None:
            return await self._engine.generate(prompt_ids, sampling, request_id)
        while self._left(trajectory) <= 0:
            self._held.append(asyncio.get_running_loop().create_future())
            await self._held[-1]
        self._running[request_id], self._done_before[request_id] = trajectory, 0
        try:
            generation = await self._engine.generate(prompt_ids, sampling, request_id, quota=self._quota(request_id))
        finally:
            del self._running[request_id], self._done_before[request_id]
        now = sum(span.end - span.start for span in generation.spans if span.version == self._version)
        self._sampled[trajectory] = self._sampled.get(trajectory, 0) + now
        return generation

    async def abort(self, request_id: str) -> None:
        """End a request."""
        await self._engine.abort(request_id)

    async def pause(self, mode: Literal["keep", "abort"], kv: Literal["recompute", "stale"]) -> None:
        """Let every trajectory sample what its plan allows at this version, then pause."""
        await self._settle()
        await self._engine.pause(mode, kv)

    async def partials(self) -> Mapping[str, Generation]:
        """What each request has sampled so far."""
        return await self._engine.partials()

    async def update_weights(self, update: WeightUpdate, version: PolicyVersion) -> None:
        """Replace the weights; the plans' next allowances begin."""
        await self._engine.update_weights(update, version)
        self._version = version
        self._sampled.clear()
        partials = await self._engine.partials()
        self._done_before = {request: len(partials[request].output_ids) for request in self._running}

    async def resume(self) -> None:
        """Go on sampling; trajectories do so when the driver is idle, and the groups in training are confirmed by then."""
        await self._engine.resume()

    async def drive(self) -> None:
        """Step the engine whenever it can sample; runs until it is cancelled.

        Raises:
            AccountingError: Everything waits for the engine and the engine for nothing: a defect.
        """
        num_idle = 0
        while True:
            num_idle = 0 if self._engine.drive_once() else num_idle + 1
            if num_idle == 1:
                self._release()  # groups may have moved up in the order of training
            if num_idle > STALLED_ROUNDS:
                raise AccountingError(
                    "lockstep stalled: no trajectory may sample, and none is ready to train",
                    got=f"version {self._version}, {len(self._held)} held, {len(self._running)} running",
                    allowed="progress at every version",
                    fix="this is a defect, please report it with the recipe",
                )
            await self._yield()

    def watch(self, buffer: Buffer) -> None:
        """The order of training is that of this buffer."""
        self._buffer = buffer

    def _release(self) -> None:
        """Apply the current allowances, and let held trajectories look at theirs again."""
        for request in self._running:
            self._engine.core.set_quota(request, self._quota(request))
        held, self._held = self._held, []
        for future in held:
            if not future.done():
                future.set_result(None)

    async def _settle(self) -> None:
        """Wait until nothing can sample at this version any more."""
        idle_rounds = 0
        while idle_rounds < 3:
            idle_rounds = idle_rounds + 1 if self._engine.core.idle else 0
            await self._yield()

    @staticmethod
    async def _yield() -> None:
        for _ in range(SETTLE_ROUNDS):
            await asyncio.sleep(0)

    def _quota(self, request: str) -> int | None:
        """How many tokens a running request may have sampled in all by the end of this version; None: any number."""
        left = self._left(self._running[request])
        return None if math.isinf(left) else self._done_before[request] + max(0, int(left))

    def _left(self, trajectory: str) -> float:
        """Tokens that a trajectory may still sample at this version, but for its running request's own."""
        return self._allowance(trajectory) - self._sampled.get(trajectory, 0)

    def _allowance(self, trajectory: str) -> float:
        group = self._group(trajectory)
        if group is None or self._buffer is None:
            return math.inf
        lockstep, window = self._config.lockstep, self._config.window
        if trajectory not in self._plans:
            rng = random.Random(f"{self._config.seed}/{trajectory}")
            self._plans[trajectory] = draw_plan(lockstep.lag, window, lockstep.tokens_per_version, rng)
        lag = self._buffer.rank(group) // self._config.rollout.prompts_per_update
        plan = self._plans[trajectory]
        return plan[lag] if any(plan[: lag + 1]) else math.inf  # past its last lag nothing holds it

    @staticmethod
    def _group(trajectory: str) -> str | None:
        """The training group of a trajectory ``g000012.3``; None for evaluation and probe."""
        group, dot, _ = trajectory.rpartition(".")
        return group if dot and group.startswith("g") else None


@asynccontextmanager
async def open_lockstep(
    config: RunConfig, model_folder: Path, probe_ids: Sequence[int], sampler_seed: int
) -> AsyncIterator[Backend]:
    """Engine and trainer in this process."""
    clock = time.perf_counter
    in_flight = (config.window + 1) * config.rollout.prompts_per_update * config.rollout.group_size
    spec = EngineSpec(
        model_path=str(model_folder),
        numerics=config.engine.precision,
        max_num_seqs=max(config.engine.max_num_seqs, in_flight + 1),  # held trajectories keep their slots; one for the probe
        max_context=config.env.max_episode_tokens,
        seed=sampler_seed,
        adapter_scale=config.model.adapter_scale,
    )
    core = EngineCore(spec)
    engine = LockstepEngine(EmbeddedEngine(core), config)
    trainer = inline_trainer(open_trainer(config, model_folder, probe_ids, clock))

    async def stats() -> EngineStats:
        return core.stats

    driver = asyncio.create_task(engine.drive())
    try:
        yield Backend(
            engine=engine,
            trainer=trainer,
            run_environment=run_inline,
            engine_stats=stats,
            clock=clock,
            real_time=False,
            watch=engine.watch,
            scorer=_scorer(config, model_folder, probe_ids),
            workers=(driver,),
        )
    finally:
        driver.cancel()


def _scorer(config: RunConfig, model_folder: Path, probe_ids: Sequence[int]) -> InlineScorer | None:
    if not SOURCES.find(config.proximal.source).needs_scorer:
        return None
    return InlineScorer(ScorerModel(config, model_folder, probe_ids), config.proximal.scorer_versions)
