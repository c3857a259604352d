"""A whole run: prepare the model and the task, open the runtime, loop, and write down what came out, whatever happened."""

from __future__ import annotations

import asyncio
import dataclasses
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager, chdir, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from rich.console import Console

from oldlogits.config.guard import Caution, cautions
from oldlogits.config.programs import rows_in_words
from oldlogits.config.schema import RunConfig
from oldlogits.core.backend import BACKENDS
from oldlogits.core.engine import ENGINES
from oldlogits.core.engine_stats import Incident
from oldlogits.core.environment import Environment, is_model_folder
from oldlogits.core.errors import OldLogitsError, RunInterrupted, RunWriteError, writing
from oldlogits.core.registry import require
from oldlogits.loop.backend import Backend, BackendSpec
from oldlogits.loop.loop import Loop
from oldlogits.loop.make import make_loop, run_started
from oldlogits.loop.probe import PROBE_TOKENS
from oldlogits.loop.resume import LoopState, check_records, recorded_recipe, refuse_another_run, sampler_seed, whole_checkpoint
from oldlogits.loop.task import Task
from oldlogits.models.checksums import check_model_sums
from oldlogits.models.load import load_tokenizer, meta_model, read_model_config
from oldlogits.record.bus import Event, EventSink
from oldlogits.record.event_log import EventLog
from oldlogits.record.events import RunEnded, ServerDown, ServerUp, WarmStarted, Warned
from oldlogits.record.folder import RunFolder
from oldlogits.record.live.view import LiveView
from oldlogits.record.owner import owned
from oldlogits.record.recording import Recording, record_run
from oldlogits.record.report.follow import ReportFollower
from oldlogits.record.report.page import write_report
from oldlogits.record.summary import Ended, Summary, summarise_folder
from oldlogits.record.trackers.feed import TrackerFeed, find_trackers, open_feeds
from oldlogits.rollout.journal.journal import Journal, read
from oldlogits.rpc.processes import keeping_what_is_built
from oldlogits.run.chat import chat_cautions, chat_format
from oldlogits.run.players import open_player
from oldlogits.run.specs import backend_kind, backend_spec, engine_spec, server_options
from oldlogits.run.start import Start, anchored, prepare_model
from oldlogits.run.tasks import load_tasks
from oldlogits.versions.disk import Disk

Open = Callable[[BackendSpec], AbstractAsyncContextManager[Backend]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """How a run ended: its summary, and the error of this package that stopped it, if one did."""

    summary: Summary
    error: OldLogitsError | None


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """Why a run ended: an error of this package, or a defect, which is raised as it is when everything is written down."""

    reason: Ended
    error: OldLogitsError | None = None
    defect: Exception | None = None


def run(
    config: RunConfig,
    out: Path,
    *,
    resume: bool = False,
    open_backend: Open | None = None,
    console: Console | None = None,
    follow: bool = False,
) -> RunResult:
    """Run a recipe to its end, and write summary and report even when it is interrupted or fails.

    Args:
        config: A checked recipe.
        out: The run folder; absent or empty, or to resume.
        resume: Go on from the latest checkpoint in `out`.
        open_backend: Opens what supplies engine and trainer; that of the recipe's kind of backend by default.
        console: The console that shows progress; standard output by default.
        follow: Whether the report is written while the run goes on, too, by a process of its own.

    Raises:
        OldLogitsError: It could not be started.
    """
    opens: Open = open_backend or backend_kind(config).open
    with chdir(Path()):  # back to where it was, wherever environment code went
        return _run_recipe(config, out.absolute(), resume, opens, console, follow)


def _run_recipe(recipe: RunConfig, out: Path, resume: bool, opens: Open, console: Console | None, follow: bool) -> RunResult:
    config = anchored(recipe)
    environment_class = check_task(config)
    trackers = find_trackers(config.record.trackers)
    RunFolder(path=out).check_free(resume=resume)
    with owned(out):
        folder = RunFolder.create(out, resume=resume)
        checkpoint, before = whole_checkpoint(folder) if resume else None, ""
        if checkpoint is not None:
            before = recorded_recipe(folder).versions.folder or str(folder.versions)
            refuse_another_run(recipe, folder)
            check_records(folder, LoopState.read(checkpoint))
        versions, config = config.versions, _with_versions_folder(config, folder, before)
        folder.write_config(dataclasses.asdict(recipe) | {"versions": dataclasses.asdict(versions)})
        feeds = open_feeds(trackers, folder, dataclasses.asdict(recipe))
        follower = ReportFollower(folder.path)
        title = f"oldlogits: {config.env.target}, {config.variant}, {config.runtime.type}"
        try:
            with LiveView(total_updates=config.num_updates, title=title, console=console) as view:
                whole = checkpoint if not config.model.lora_rank else None  # adapters are restored on top of their base
                start = prepare_model(config, environment_class, view.note) if whole is None else Start(model=whole / "model")
                if config.env.is_program:
                    view.note(f"rows: {rows_in_words(recipe.env)}")
                view.note(f"starting engine and trainer ({config.runtime.type})")
                end = asyncio.run(_run(config, folder, view, start, checkpoint, opens, feeds, [follower] if follow else []))
        except KeyboardInterrupt:  # before the loop began, or for the second time
            end = End(reason="interrupted")
            with suppress(RunWriteError), EventLog(folder.events) as log:
                log.emit(RunEnded(version=-1, reason="interrupted", error="", accounting=None))
        finally:
            follower.close()
        result = _conclude(config, folder, end)
        for trouble in filter(None, [feed.finish(folder) for feed in feeds]):
            (console or Console()).print(f"warning: {trouble}", markup=False)
    if end.defect is not None:
        raise end.defect
    return result


def _conclude(config: RunConfig, folder: RunFolder, end: End) -> RunResult:
    """Write what came out; a disk that does not take it is the run's error, unless it has one."""
    summary, error = summarise_folder(folder), end.error
    if not summary.variant:  # it was interrupted before it began
        kind, source = config.runtime.type, config.proximal.source
        summary = dataclasses.replace(summary, runtime=kind, variant=config.variant, source=source, seed=config.seed)
    summary = dataclasses.replace(summary, ended=summary.ended or end.reason)  # a full disk does not take the event
    try:
        summary.write(folder.summary)
        write_report(folder.path)
    except RunWriteError as refused:
        error = error or refused
        summary = dataclasses.replace(summary, ended="error")
    return RunResult(summary=summary, error=error)


def _with_versions_folder(config: RunConfig, folder: RunFolder, before: str) -> RunConfig:
    """Name where versions go that the memory does not hold: in the run folder, where the recipe names none.

    Those of a run that this one goes on from, in the folder `before`, are needed by nobody: its checkpoint holds what is.

    Raises:
        StoreBusyError: The folder has an owner.
        StoreWriteError: It holds versions, and it is not the one `before`.
    """
    versions = config.versions
    if not versions.budget_bytes:
        return config
    path = Path(versions.folder or folder.versions)
    for own in (path, *path.glob("rank*")):
        with writing(own):
            if before == str(path):
                Disk.clear(own)
            else:
                Disk.create(own).close()
    return dataclasses.replace(config, versions=dataclasses.replace(versions, folder=str(path)))


def check_extras(config: RunConfig) -> None:
    """Refuse a recipe whose packages are not installed, before a run folder is made or anything is loaded."""
    find_trackers(config.record.trackers)
    needed = (
        (config.env.is_program, "serve", ("fastapi", "uvicorn"), "an agent program"),
        (ENGINES.find(config.engine.type)().has_servers, "vllm", ("aiohttp",), "an engine over HTTP"),
        (BACKENDS.find(config.runtime.type).on_cluster, "ray", ("ray", "aiohttp", "uvicorn"), "a run on a cluster"),
        (config.model.lora_rank > 0, "lora", ("peft",), "model.lora_rank"),
    )
    for is_needed, extra, packages, what in needed:
        if is_needed:
            require(extra, *packages, what=what)


def check_task(config: RunConfig) -> type[Environment]:
    """Refuse an environment, rows or a model folder that cannot be used, before anything is written; return the environment."""
    environment_class, _ = load_tasks(config)
    check_extras(config)
    if is_model_folder(config.model.path):
        folder = Path(config.model.path)
        check_model_sums(folder)
        meta_model(read_model_config(folder), folder)  # before the engine: none samples what the trainer refuses
        ENGINES.find(config.engine.type)().check(engine_spec(config, folder), server_options(config))
        chat_format(config, folder, environment_class)
    return environment_class


async def _run(
    config: RunConfig,
    folder: RunFolder,
    view: LiveView,
    start: Start,
    checkpoint: Path | None,
    opens: Open,
    feeds: Sequence[TrackerFeed],
    others: Sequence[EventSink],
) -> End:
    tokenizer = load_tokenizer(start.model)
    environment_class, rows = load_tasks(config)
    chat = chat_format(config, start.model, environment_class)
    state = LoopState() if checkpoint is None else LoopState.read(checkpoint)
    kept = None if backend_kind(config).steps_engine else folder.rollouts  # lockstep samples the same again
    progress = None if checkpoint is None else read(checkpoint, kept, state.journal)
    seed = sampler_seed(config.seed, state.num_updates)
    probe_ids = chat.prompt_ids("hello")[-PROBE_TOKENS:]  # a fixed prompt: system prompt and tools
    every = {"tokens_every": config.record.tokens_every, "transcripts_every": config.record.transcripts_every}
    with ExitStack() as stack:
        recorded = record_run(folder, view, lambda ids: str(tokenizer.decode(ids)), **every, trackers=feeds, others=others)
        recording = stack.enter_context(recorded)
        if checkpoint is None and start.is_warm:
            cached, steps, loss = not start.steps, start.steps, start.loss
            recording.events.emit(WarmStarted(version=-1, steps=steps, loss=loss, cached=cached, seconds_s=start.seconds_s))
        spec = backend_spec(config, start.model, probe_ids, sampler_seed=seed, folder=folder.path)
        async with opens(spec) as backend:
            stack.enter_context(keeping_what_is_built())
            if checkpoint is not None:
                await backend.trainer.restore(checkpoint)
            hosted = backend.host_environment(environment_class)
            log = folder.path / "program.log"
            async with open_player(config, backend.engine, backend.run_environment, chat, hosted, log) as player:
                task = Task(player=player, rows=rows, probe_ids=probe_ids)
                journal = stack.enter_context(closing(Journal(kept, progress, state.journal)))
                loop = make_loop(config, task, backend, recording, journal)
                loop.go_on(state)
                backend.watch(loop.buffer)
                backend.listen(lambda news: recording.events.emit(_event_of(news, loop.version)))
                known = [*cautions(config), *chat_cautions(config, chat)]
                return await _finish(config, loop, backend, recording, view.note, known)


def _event_of(news: Incident | Caution, version: int) -> Event:
    """The event of what the runtime says by itself."""
    if isinstance(news, Caution):
        return Warned(version=version, **dataclasses.asdict(news))
    if news.what == "up":
        return ServerUp(version=version, server=news.server, reason=news.reason)
    fields = dataclasses.asdict(news)
    del fields["what"]
    return ServerDown(version=version, **fields)


async def _finish(
    config: RunConfig, loop: Loop, backend: Backend, recording: Recording, note: Callable[[str], None], known: Sequence[Caution]
) -> End:
    """Run the loop to its end, by itself, by Ctrl-C or by an error."""
    end, num_kept = End(reason="done"), loop.state.num_events
    async with _interruptible(note) as interruption:
        try:
            trainer = await backend.trainer.state()
            version = trainer.version
            recording.events.emit(await run_started(config, backend, version=version, num_kept=num_kept))
            if trainer.padded_because:
                message = f"trainer.layout = '{config.trainer.layout}', but the trainer pads: {trainer.padded_because}"
                known = [*known, Caution(name="padded", message=message, figures={})]
            for warning in recording.cut:
                recording.events.emit(dataclasses.replace(warning, version=version))
            if not await _supervise(loop, known, backend, interruption):
                end = End(reason="interrupted")
                await loop.checkpoint()
                await loop.checkpoints.finish()
        except OldLogitsError as error:
            end = End(reason="error", error=error)
        except ExceptionGroup as group:
            own = own_error(group)
            end = End(reason="error", error=own, defect=None if own else group)
        except Exception as defect:  # everything is written down before it is raised
            end = End(reason="error", defect=defect)
        with suppress(OldLogitsError):  # what is being written is not lost; the run has its error already
            await loop.checkpoints.finish()
    loop.cancel_all()
    account = {**dataclasses.asdict(loop.buffer.account), "queued": loop.buffer.queued, "running": loop.buffer.running}
    what = str(end.error or end.defect or "")
    try:
        recording.events.emit(RunEnded(version=loop.version, reason=end.reason, error=what, accounting=account))
    except RunWriteError as error:
        end = end if end.error or end.defect else End(reason="error", error=error)
    return end


async def _supervise(loop: Loop, known: Sequence[Caution], backend: Backend, interruption: asyncio.Event) -> bool:
    """Wait for the loop; an interruption or the end of one of the runtime's workers stops it. False: it was interrupted."""
    main = asyncio.create_task(loop.run(known))
    stop = asyncio.create_task(interruption.wait())
    watch = asyncio.create_task(loop.checkpoints.watch())
    await asyncio.wait({main, stop, watch, *backend.workers}, return_when=asyncio.FIRST_COMPLETED)
    stop.cancel()
    main.cancel()
    watch.cancel()
    await asyncio.gather(main, watch, return_exceptions=True)  # their errors count as seen, whatever is raised below
    for worker in (*backend.workers, watch):
        if worker.done() and not worker.cancelled():
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
            raise RunInterrupted
        loop.call_soon_threadsafe(note, "interrupted: finishing the update, then a checkpoint (again to stop at once)")
        loop.call_soon_threadsafe(interruption.set)

    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interruption
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def own_error(group: ExceptionGroup[Exception]) -> OldLogitsError | None:
    """The first error of this package in a group of nothing else; None: there is a defect among them."""
    own, other = group.split(OldLogitsError)
    if other is not None or own is None:
        return None
    leaf: BaseException = own
    while isinstance(leaf, BaseExceptionGroup):
        leaf = leaf.exceptions[0]
    assert isinstance(leaf, OldLogitsError)
    return leaf
