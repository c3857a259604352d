"""Runtime "local": engine and trainer in processes of their own on this machine, environments in threads.

controller (this process, no model)  ---pipe---> engine process   samples while ...
                                     ---pipe---> trainer process  ... this one scores and steps
                     ---pipe---> scorer process   source "dedicated" only
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path

from oldlogits.config import RunConfig
from oldlogits.rollout.process import EngineProcess
from oldlogits.rollout.shared import unshare
from oldlogits.rollout.spec import EngineSpec
from oldlogits.runtime.environment import ThreadRunner
from oldlogits.runtime.handles import Handles
from oldlogits.runtime.scorer_process import ScorerProcess
from oldlogits.runtime.trainer_process import TrainerProcess


@asynccontextmanager
async def open_local(
    config: RunConfig, model_folder: Path, probe_ids: Sequence[int], sampler_seed: int
) -> AsyncIterator[Handles]:
    """Start the processes; on leaving none of them stays behind, whatever happened."""
    spec = EngineSpec(
        model_path=str(model_folder),
        numerics=config.engine.numerics,
        num_slots=config.engine.num_slots,
        max_context=config.env.max_tokens,
        seed=sampler_seed,
        adapter_scale=config.model.adapter_scale,
    )
    runner = ThreadRunner(timeout_s=config.env.timeout_s, latency_s=config.env.latency_s, seed=sampler_seed)
    with ExitStack() as stack:  # each is closed even if Ctrl-C interrupts the closing of another
        stack.callback(unshare, os.getpid())
        with _ignoring_interrupts():
            engine = EngineProcess(spec)
            stack.callback(engine.close)
            trainer = TrainerProcess(config, model_folder, probe_ids)
            stack.callback(trainer.close)
            scorer = ScorerProcess(config, model_folder, probe_ids) if config.source.type == "dedicated" else None
            if scorer is not None:
                stack.callback(scorer.close)
        await trainer.ready()
        workers: tuple[asyncio.Task[None], ...] = ()
        if scorer is not None:
            await scorer.ready()
            watch = asyncio.create_task(scorer.watch())  # most of its calls are nobody's to wait for
            workers = (watch,)
            stack.callback(watch.cancel)
        yield Handles(
            engine=engine,
            trainer=trainer.handle,
            run_environment=runner,
            engine_stats=engine.stats,
            clock=time.perf_counter,
            real_time=True,
            watch=lambda buffer: None,
            scorer=scorer,
            workers=workers,
        )


@contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    """Processes started here ignore Ctrl-C from their first instruction on: it is the controller's to handle."""
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
