"""Runtime "local": engine and trainer in processes of their own on this machine, environments in threads.

controller (this process, no model)  ---pipe---> engine process   samples while ... (engine.type "vllm": HTTP, servers)
                                     ---pipe---> trainer process  ... this one scores and steps
                     ---pipe---> scorer process   source "dedicated" only
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path

from oldlogits.backends.open_engine import OpenEngine, open_servers
from oldlogits.backends.scorer_process import ScorerProcess
from oldlogits.backends.trainer_process import TrainerProcess
from oldlogits.config import RunConfig
from oldlogits.core.source import SOURCES
from oldlogits.engines.embedded.process import EngineProcess
from oldlogits.engines.shared_memory import unshare, unshare_ended
from oldlogits.engines.spec import EngineSpec
from oldlogits.loop.backend import Backend
from oldlogits.rollout.environment_runner import ThreadRunner


@asynccontextmanager
async def open_local(
    config: RunConfig, model_folder: Path, probe_ids: Sequence[int], sampler_seed: int, *, log_folder: Path
) -> AsyncIterator[Backend]:
    """Start the processes; on leaving none of them stays behind, whatever happened."""
    runner = ThreadRunner(timeout_s=config.env.timeout_s, latency_s=config.env.latency_s, seed=sampler_seed)
    async with AsyncExitStack() as stack:  # each is closed even if Ctrl-C interrupts the closing of another
        unshare_ended()
        stack.callback(unshare, os.getpid())
        with _ignoring_interrupts():
            opened = await stack.enter_async_context(_open_engine(config, model_folder, sampler_seed, log_folder))
            trainer = TrainerProcess(config, model_folder, probe_ids)
            stack.callback(trainer.close)
            scorer = (
                ScorerProcess(config, model_folder, probe_ids) if SOURCES.find(config.proximal.source).needs_scorer else None
            )
            if scorer is not None:
                stack.callback(scorer.close)
        await opened.ready()
        await trainer.ready()
        workers: list[asyncio.Task[None]] = []
        if scorer is not None:
            await scorer.ready()
            workers.append(asyncio.create_task(scorer.watch()))  # most of its calls are nobody's to wait for
        if opened.supervise is not None:
            workers.append(asyncio.create_task(opened.supervise()))
        for worker in workers:
            stack.push_async_callback(_cancelled, worker)
        yield Backend(
            engine=opened.engine,
            trainer=trainer.handle,
            run_environment=runner,
            engine_stats=opened.stats,
            clock=time.perf_counter,
            real_time=True,
            watch=lambda buffer: None,
            scorer=scorer,
            listen=opened.listen,
            workers=tuple(workers),
        )


@asynccontextmanager
async def _open_engine(config: RunConfig, model_folder: Path, seed: int, log_folder: Path) -> AsyncIterator[OpenEngine]:
    """The engine of the recipe, as a process of this run or as servers."""
    if config.engine.type == "vllm":
        async with open_servers(config, model_folder, seed, log_folder) as opened:
            yield opened
        return
    spec = EngineSpec(
        model_path=str(model_folder),
        numerics=config.engine.precision,
        max_num_seqs=config.engine.max_num_seqs,
        max_context=config.env.max_episode_tokens,
        seed=seed,
        adapter_scale=config.model.adapter_scale,
    )
    engine = EngineProcess(spec)
    try:
        yield OpenEngine(engine=engine, stats=engine.stats, ready=_at_once, supervise=None, listen=lambda hear: None)
    finally:
        engine.close()


async def _cancelled(worker: asyncio.Task[None]) -> None:
    """Cancel a task, and wait until it has put away what it used."""
    worker.cancel()
    await asyncio.gather(worker, return_exceptions=True)


async def _at_once() -> None:
    """Its calls wait until it is ready."""


@contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    """Processes started here ignore Ctrl-C from their first instruction on: it is the controller's to handle."""
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
