"""A whole run: prepare the model and the task, open the runtime, loop, and write down what came out, whatever happened."""

from __future__ import annotations

import asyncio
import dataclasses
import shutil
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from rich.console import Console

from oldlogits.config import RunConfig
from oldlogits.config.engine import engine_spec, server_options
from oldlogits.core.engine import ENGINES, Sampling
from oldlogits.core.environment import Environment, is_model_folder
from oldlogits.core.errors import OldLogitsError
from oldlogits.core.parser import PARSERS
from oldlogits.envs.base import system_prompt_of
from oldlogits.envs.tools import tool_schemas
from oldlogits.loop.backend import Backend, BackendSpec
from oldlogits.loop.loop import Loop, Task
from oldlogits.loop.probe import PROBE_TOKENS
from oldlogits.loop.resume import refuse_another_run, sampler_seed
from oldlogits.loop.run_logger import RunLogger
from oldlogits.loop.totals import Totals
from oldlogits.models.chat import ChatFormat
from oldlogits.models.load import load_tokenizer
from oldlogits.record.folder import RunFolder
from oldlogits.record.live import LiveView
from oldlogits.record.report.page import write_report
from oldlogits.record.summary import Ended, Summary
from oldlogits.rollout.buffer import Buffer, TrajectoryCounts
from oldlogits.rollout.staleness import StalenessBound
from oldlogits.rollout.turns import Agent, TurnLimits
from oldlogits.run.specs import backend_kind, backend_spec
from oldlogits.run.start import Start, prepare_model
from oldlogits.run.tasks import load_tasks
from oldlogits.train.reports import ConsistencyErrors

Open = Callable[[BackendSpec], AbstractAsyncContextManager[Backend]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """How a run ended: its summary, and what stopped it: an error of this package, or a defect, to be raised as it is."""

    summary: Summary
    error: OldLogitsError | None
    defect: Exception | None = None


def run(
    config: RunConfig,
    out: Path,
    *,
    resume: bool = False,
    open_backend: Open | None = None,
    console: Console | None = None,
) -> RunResult:
    """Run a recipe to its end, and write summary and report even when it is interrupted or fails.

    Args:
        config: A checked recipe.
        out: The run folder; absent or empty, or to resume.
        resume: Go on from the latest checkpoint in `out`.
        open_backend: Opens what supplies engine and trainer; that of the recipe's kind of backend by default.
        console: Where to show progress; standard output by default.

    Raises:
        OldLogitsError: It could not be started.
    """
    opens: Open = open_backend or backend_kind(config).open
    environment_class = _check_task(config)
    folder = RunFolder.create(out, resume=resume)
    checkpoint = folder.latest_checkpoint() if resume else None
    if checkpoint is not None:
        refuse_another_run(config, folder)
    folder.write_config(dataclasses.asdict(config))
    config = _with_versions_folder(config, folder)
    totals = Totals() if checkpoint is None else Totals.read(checkpoint / "state" / "totals.json")
    title = f"oldlogits: {config.env.target}, {config.variant}, {config.runtime.type}"
    try:
        with LiveView(total_updates=config.num_updates, title=title, console=console) as view:
            whole = checkpoint if not config.model.lora_rank else None  # adapters are restored on top of their base
            start = prepare_model(config, environment_class, view.note) if whole is None else Start(model=whole / "model")
            view.note(f"starting engine and trainer ({config.runtime.type})")
            result = asyncio.run(_run(config, folder, view, start, totals, checkpoint, opens))
    except KeyboardInterrupt:  # before the loop began, or for the second time
        result = RunResult(summary=_interrupted(config, totals), error=None)
    result.summary.write(folder.summary)
    write_report(folder.path)
    if result.defect is not None:
        raise result.defect
    return result


def _with_versions_folder(config: RunConfig, folder: RunFolder) -> RunConfig:
    """Versions over the budget lie in the run folder; those of a run that this one goes on from are needed by nobody."""
    if not config.versions.budget_bytes or config.versions.folder:
        return config
    path = folder.path / "versions"
    shutil.rmtree(path, ignore_errors=True)
    return dataclasses.replace(config, versions=dataclasses.replace(config.versions, folder=str(path)))


def _check_task(config: RunConfig) -> type[Environment]:
    """Refuse an environment, rows or a model folder that cannot be used, before anything is written; return the environment."""
    environment_class, _ = load_tasks(config)
    if is_model_folder(config.model.path):
        ENGINES.find(config.engine.type)().check(engine_spec(config, Path(config.model.path)), server_options(config))
        ChatFormat(load_tokenizer(Path(config.model.path)))
    return environment_class


async def _run(
    config: RunConfig,
    folder: RunFolder,
    view: LiveView,
    start: Start,
    totals: Totals,
    checkpoint: Path | None,
    opens: Open,
) -> RunResult:
    tokenizer = load_tokenizer(start.model)
    chat = ChatFormat(tokenizer)
    environment_class, rows = load_tasks(config)
    seed = sampler_seed(config.seed, totals.num_updates)
    probe_ids = _probe_ids(chat, environment_class)
    recorder = RunLogger(config, folder, view, lambda ids: str(tokenizer.decode(ids)))
    if checkpoint is None and start.is_warm:
        recorder.warm_started(start.steps, start.loss, start.seconds_s)
    try:
        spec = backend_spec(config, start.model, probe_ids, sampler_seed=seed, folder=folder.path)
        async with opens(spec) as handles:
            if checkpoint is not None:
                await handles.trainer.restore(checkpoint)
            agent = _agent(config, handles, chat)
            hosted = handles.host_environment(environment_class)
            task = Task(environment_class=hosted, rows=rows, agent=agent, probe_ids=probe_ids)
            loop = Loop(config, task, handles, recorder, totals)
            handles.watch(loop.buffer)
            handles.listen(lambda news: recorder.heard(news, totals, version=loop.version))
            return await _finish(config, loop, handles, recorder)
    finally:
        recorder.close()


async def _finish(config: RunConfig, loop: Loop, handles: Backend, recorder: RunLogger) -> RunResult:
    """Run the loop to its end, by itself, by Ctrl-C or by an error, and sum up."""
    ended: Ended = "done"
    error: OldLogitsError | None = None
    defect: Exception | None = None
    async with _interruptible(recorder.view.note) as interruption:
        try:
            if not await _supervise(loop, handles, interruption):
                ended = "interrupted"
                await loop.checkpoint()
        except OldLogitsError as raised:
            ended, error = "error", raised
        except ExceptionGroup as group:
            ended, error = "error", _own_error(group)
            defect = None if error else group
        except Exception as raised:  # a defect: everything is written down before it is raised
            ended, defect = "error", raised
    loop.cancel_all()
    recorder.ended(ended, str(error or defect or ""), version=loop.version)
    summary = loop.totals.summary(config, loop.buffer, loop.consistency, ended)
    return RunResult(summary=summary, error=error, defect=defect)


async def _supervise(loop: Loop, handles: Backend, interruption: asyncio.Event) -> bool:
    """Wait for the loop; an interruption or the end of one of the runtime's workers stops it. False: it was interrupted."""
    main = asyncio.create_task(loop.run())
    stop = asyncio.create_task(interruption.wait())
    await asyncio.wait({main, stop, *handles.workers}, return_when=asyncio.FIRST_COMPLETED)
    stop.cancel()
    main.cancel()
    await asyncio.gather(main, return_exceptions=True)  # its error counts as seen, whatever is raised below
    for worker in handles.workers:
        if worker.done():
            worker.result()
    if main.cancelled():
        return False
    main.result()
    return True


@asynccontextmanager
async def _interruptible(note: Callable[[str], None]) -> AsyncIterator[asyncio.Event]:
    """An event that Ctrl-C or SIGTERM sets; a second signal stops at once."""
    loop, interruption = asyncio.get_running_loop(), asyncio.Event()
    num_signals = 0

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal num_signals
        num_signals += 1
        if num_signals > 1:  # whatever runs, environment code that hangs in this process included
            raise KeyboardInterrupt
        loop.call_soon_threadsafe(note, "interrupted: finishing the update, then a checkpoint (again to stop at once)")
        loop.call_soon_threadsafe(interruption.set)

    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interruption
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _interrupted(config: RunConfig, totals: Totals) -> Summary:
    """The summary as of the last update; trajectories that were outstanding then count as cancelled."""
    bound = StalenessBound(max_staleness=config.window, prompts_per_update=config.rollout.prompts_per_update)
    buffer = Buffer(bound, filter_uniform=False)
    buffer.account = account = TrajectoryCounts(**totals.account)
    account.cancelled = account.submitted - account.trained - account.filtered - account.failed
    return totals.summary(config, buffer, ConsistencyErrors(), "interrupted")


def _own_error(group: ExceptionGroup[Exception]) -> OldLogitsError | None:
    """The first error of this package in a group of nothing else; None: there is a defect among them."""
    own, other = group.split(OldLogitsError)
    if other is not None or own is None:
        return None
    leaf: BaseException = own
    while isinstance(leaf, BaseExceptionGroup):
        leaf = leaf.exceptions[0]
    assert isinstance(leaf, OldLogitsError)
    return leaf


def _agent(config: RunConfig, handles: Backend, chat: ChatFormat) -> Agent:
    env = config.env
    return Agent(
        engine=handles.engine,
        chat=chat,
        parser=PARSERS.find(env.parser)(),
        limits=TurnLimits(
            max_turns=env.max_turns, max_tokens_per_turn=env.max_tokens_per_turn, max_tokens=env.max_episode_tokens
        ),
        sampling=Sampling(max_tokens=env.max_tokens_per_turn, temperature=config.sampling.temperature),
        run_environment=handles.run_environment,
    )


def _probe_ids(chat: ChatFormat, environment_class: type[Environment]) -> list[int]:
    """A fixed prompt of the environment: its system prompt and tools."""
    messages = [{"role": "system", "content": system_prompt_of(environment_class)}, {"role": "user", "content": "hello"}]
    return chat.prompt_ids(messages, tool_schemas(environment_class))[-PROBE_TOKENS:]
