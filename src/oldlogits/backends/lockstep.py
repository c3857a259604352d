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
from dataclasses import replace

from oldlogits.backends.lag import Plan, draw_plan
from oldlogits.backends.processes import build_scorer, scorer_client
from oldlogits.backends.torchrun.dispatch import open_trainer
from oldlogits.config.systems import LockstepConfig
from oldlogits.core.engine import Generation, KVMode, PauseMode, Sampling, StepwiseEngine, trajectory_of
from oldlogits.core.engine_stats import EngineCapabilities, EngineStats
from oldlogits.core.errors import AccountingError
from oldlogits.core.weights import PolicyVersion, WeightUpdate
from oldlogits.loop.backend import Backend, BackendSpec
from oldlogits.models.device import configure_process
from oldlogits.rollout.buffer import Buffer
from oldlogits.rollout.environment_runner import run_inline
from oldlogits.rpc.client import Inline, client
from oldlogits.train.calls import TrainerCalls

STALLED_ROUNDS = 100_000
"""Idle turns of the driver after which something must be wrong."""

SETTLE_ROUNDS = 8
"""Turns of the event loop after which every task that could go on has asked the engine again, or waits."""


class LockstepEngine:
    """An engine under lag plans, drawn with a seed; a `RolloutEngine`."""

    def __init__(self, engine: StepwiseEngine, config: LockstepConfig, *, seed: int, prompts_per_update: int) -> None:
        self._engine, self._config, self._seed, self._prompts_per_update = engine, config, seed, prompts_per_update
        self.capabilities: EngineCapabilities = replace(engine.capabilities, growth=False)
        self._plans: dict[str, Plan] = {}
        self._sampled: dict[str, int] = {}  # tokens at the current version, by trajectory
        self._running: dict[str, str] = {}  # request -> trajectory
        self._done_before: dict[str, int] = {}  # tokens that a running request sampled at earlier versions
        self._version = 0
        self._held: list[asyncio.Future[None]] = []  # trajectories that may not ask the engine at this version
        self._buffer: Buffer | None = None

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

    async def pause(self, mode: PauseMode, kv: KVMode) -> None:
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

    async def stats(self) -> EngineStats:
        """Return the counters."""
        return await self._engine.stats()

    async def drive(self) -> None:
        """Step the engine whenever it can sample, until it is cancelled; a stall is an `AccountingError`."""
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

    def begin_again(self, seed: int) -> None:
        """Be as an engine that was made with this seed; nobody waits for it."""
        assert not self._running, "what ran was cancelled"
        self._sampled.clear()
        self._held.clear()
        self._engine.reset(seed)

    def _release(self) -> None:
        """Apply the current allowances, and let held trajectories look at theirs again."""
        for request in self._running:
            self._engine.set_quota(request, self._quota(request))
        held, self._held = self._held, []
        for future in held:
            if not future.done():
                future.set_result(None)

    async def _settle(self) -> None:
        """Wait until nothing can sample at this version any more."""
        idle_rounds = 0
        while idle_rounds < 3:
            idle_rounds = idle_rounds + 1 if self._engine.idle else 0
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
        if trajectory not in self._plans:
            rng, config = random.Random(f"{self._seed}/{trajectory}"), self._config
            self._plans[trajectory] = draw_plan(config.lag, config.max_lag, config.tokens_per_version, rng)
        lag = self._buffer.rank(group) // self._prompts_per_update
        plan = self._plans[trajectory]
        if lag >= len(plan):  # a run that goes on has more in flight, until it has done its updates again
            return 0.0
        return plan[lag] if any(plan[: lag + 1]) else math.inf  # past its last lag nothing holds it

    @staticmethod
    def _group(trajectory: str) -> str | None:
        """The training group of a trajectory ``g000012.3``; None for evaluation and probe."""
        group, dot, _ = trajectory.rpartition(".")
        return group if dot and group.startswith("g") else None


@asynccontextmanager
async def open_lockstep(spec: BackendSpec) -> AsyncIterator[Backend]:
    """Build engine and trainer in this process."""
    trainer = spec.trainer
    in_flight = (spec.lockstep.max_lag + 1) * spec.rollout.prompts_per_update * spec.rollout.group_size
    num_seqs = max(spec.sampler.max_num_seqs, in_flight + 1)  # held trajectories keep their slots; one for the probe
    sampler = spec.engine.build(replace(spec.sampler, max_num_seqs=num_seqs))
    engine = LockstepEngine(sampler, spec.lockstep, seed=trainer.seed, prompts_per_update=spec.rollout.prompts_per_update)
    scorer = Inline(build_scorer(spec.scorer, spec.model_folder, spec.probe_ids)) if spec.scorer is not None else None
    configure_process(num_threads=trainer.trainer.num_threads, seed=trainer.seed)
    carry_out = open_trainer(trainer, spec.model_folder, spec.probe_ids, time.perf_counter)
    calls = client(TrainerCalls, Inline(carry_out))  # type: ignore[type-abstract]
    driver = asyncio.create_task(engine.drive())
    try:
        yield Backend(
            engine=engine,
            trainer=calls,
            run_environment=run_inline,
            scorer=scorer_client(spec.scorer, scorer),
            workers=(driver,),
            real_time=False,
            watch=engine.watch,
            begin_again=engine.begin_again,
        )
    finally:
        driver.cancel()
