"""Runtime "local": engine and trainer in processes of their own on this machine, environments in threads.

controller (this process, no model)  ---pipe---> engine process   samples while ...
                                     ---pipe---> trainer process  ... this one scores and steps
                     ---pipe---> scorer process   source "dedicated" only
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from oldlogits.config import RunConfig
from oldlogits.rollout.process import EngineProcess
from oldlogits.rollout.spec import EngineSpec
from oldlogits.runtime.environment import ThreadRunner
from oldlogits.runtime.handles import Handles
from oldlogits.runtime.scorer_process import ScorerProcess
from oldlogits.runtime.trainer_process import TrainerProcess


@asynccontextmanager
async def open_local(config: RunConfig, model_folder: Path, probe_ids: Sequence[int]) -> AsyncIterator[Handles]:
    """Start the processes; on leaving none of them stays behind, whatever happened."""
    spec = EngineSpec(
        model_path=str(model_folder),
        numerics=config.engine.numerics,
        num_slots=config.engine.num_slots,
        max_context=config.env.max_tokens,
        seed=config.seed,
    )
    runner = ThreadRunner(timeout_s=config.env.timeout_s, latency_s=config.env.latency_s, seed=config.seed)
    engine = EngineProcess(spec)
    trainer = TrainerProcess(config, model_folder, probe_ids)
    scorer = ScorerProcess(config, model_folder, probe_ids) if config.source.type == "dedicated" else None
    workers: list[asyncio.Task[None]] = []
    try:
        await trainer.ready()
        if scorer is not None:
            await scorer.ready()
            workers.append(asyncio.create_task(scorer.watch()))  # most of its calls are nobody's to wait for
        yield Handles(
            engine=engine,
            trainer=trainer.handle,
            run_environment=runner,
            engine_stats=engine.stats,
            clock=time.perf_counter,
            real_time=True,
            watch=lambda buffer: None,
            scorer=scorer,
            workers=tuple(workers),
        )
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
        if scorer is not None:
            scorer.close()
        trainer.close()
        engine.close()
