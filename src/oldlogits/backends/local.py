"""The backend "local": engine and trainer in processes of their own on this machine, environments in threads.

controller (this process, no model)  ---pipe---> engine process   samples while ... (servers: HTTP)
                                     ---pipe---> trainer process  ... this one scores and steps
                                     ---pipe---> scorer process   where the source asks a second model
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager

from oldlogits.backends.processes import scorer_client, start_scorer, start_trainer
from oldlogits.engines.shared_memory import unshare, unshare_ended
from oldlogits.loop.backend import Backend, BackendSpec
from oldlogits.rollout.environment_runner import ThreadRunner
from oldlogits.rpc.client import client
from oldlogits.train.calls import TrainerCalls


@asynccontextmanager
async def open_local(spec: BackendSpec) -> AsyncIterator[Backend]:
    """Start the processes; on leaving none of them stays behind, whatever happened."""
    async with AsyncExitStack() as stack:  # each is closed even if Ctrl-C interrupts the closing of another
        unshare_ended()
        stack.callback(unshare, os.getpid())
        with ignoring_interrupts():
            opened = await stack.enter_async_context(spec.engine.open(spec.sampler, spec.servers))
            where = (spec.model_folder, spec.probe_ids, spec.runtime.heartbeat_timeout_s)
            trainer = start_trainer(spec.trainer, *where)
            stack.callback(trainer.close)
            scorer = start_scorer(spec.scorer, *where) if spec.scorer is not None else None
            if scorer is not None:
                stack.callback(scorer.close)
        await opened.ready()
        await trainer.ready()
        watched: list[Coroutine[None, None, None]] = []
        if scorer is not None:
            await scorer.ready()
            watched.append(scorer.watch())  # most of its calls are nobody's to wait for
        if opened.supervise is not None:
            watched.append(opened.supervise())
        workers = tuple(map(asyncio.create_task, watched))
        stack.push_async_callback(cancel, workers)
        yield Backend(
            engine=opened.engine,
            trainer=client(TrainerCalls, trainer),  # type: ignore[type-abstract]
            run_environment=ThreadRunner(timeout_s=spec.env.timeout_s, latency_s=spec.env.latency_s, seed=spec.sampler.seed),
            scorer=scorer_client(spec.scorer, scorer),
            workers=workers,
            listen=opened.listen,
        )


async def cancel(tasks: tuple[asyncio.Task[None], ...]) -> None:
    """Cancel tasks, and wait until they have put away what they used."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@contextmanager
def ignoring_interrupts() -> Iterator[None]:
    """Processes started here ignore Ctrl-C from their first instruction on: it is the controller's to handle."""
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
