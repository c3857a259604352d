"""The embedded engine in a process of its own, behind `RolloutEngine`.

    controller process                        engine process
    generate, abort, pause, ... --Add, Call--> drain messages; block on the pipe only when idle
    reader thread, futures <-Finished, Reply-- step; results of one step travel together
    update_weights: the host's copy in shared memory takes a patch or full weights; a Call says to load from it

The two are one user's processes and talk by pickle over a private pipe. When the engine process ends or stops
answering, every pending and every later call fails with `WorkerDiedError`.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import itertools
import multiprocessing
import signal
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final, Literal, TypeVar

import torch

from oldlogits.core.engine import EngineCapabilities, Generation, Sampling
from oldlogits.core.engine_spec import EngineSpec
from oldlogits.core.engine_stats import EngineStats
from oldlogits.core.errors import ConfigError, OldLogitsError, WorkerDiedError
from oldlogits.core.processes import exit_code, name_process
from oldlogits.core.weights import PolicyVersion, WeightUpdate
from oldlogits.engines.embedded.engine import EngineCore, capabilities_of
from oldlogits.engines.embedded.model_folder import decoder_config
from oldlogits.engines.embedded.slots import check_request
from oldlogits.engines.shared_memory import HostWeights
from oldlogits.versions import HostCopy

_T = TypeVar("_T")
_Key = TypeVar("_Key")

_EXIT_S: Final = 10.0
"""How long a process that was asked to end may take before it is killed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Add:
    request_id: str
    prompt_ids: list[int]
    sampling: Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class _Abort:
    request_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pause:
    mode: Literal["keep", "abort"]
    kv: Literal["recompute", "stale"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Update:
    copy: Path
    held: PolicyVersion
    version: PolicyVersion


_Action = _Pause | _Update | Literal["start", "partials", "resume", "stats"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    """A control call; its answer is a `_Reply` of the same number."""

    number: int
    action: _Action


_Value = Mapping[str, Generation] | EngineStats | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reply:
    number: int
    value: _Value | OldLogitsError


@dataclass(frozen=True, slots=True, kw_only=True)
class _Finished:
    generations: list[tuple[str, Generation | OldLogitsError]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Crashed:
    """The last words of an engine process that met an unforeseen error."""

    error: OldLogitsError


_ToChild = _Add | _Abort | _Call | Literal["close"]
_FromChild = _Reply | _Finished | _Crashed


class EngineProcess:
    """Starts an engine process and speaks to it; use `close` when done.

    The constructor returns at once; calls wait until the engine is ready.

    Args:
        spec: What to build.
        control_timeout_s: How long pause, partials, update_weights, resume and stats may take, start-up included.

    Raises:
        ModelFolderError: The model folder is missing or not supported.
        ConfigError: The spec is out of range.
    """

    def __init__(self, spec: EngineSpec, *, control_timeout_s: float = 300.0) -> None:
        self._vocab_size = decoder_config(spec).vocab_size
        self._spec, self._control_timeout_s = spec, control_timeout_s
        self._numbers = itertools.count()
        self._lock = threading.Lock()  # guards the next three; futures are resolved by the reader thread
        self._generations: dict[str, Future[Generation]] = {}
        self._calls: dict[int, Future[_Value]] = {}
        self._death: OldLogitsError | None = None
        self._weights = HostWeights()
        self._send_lock = threading.Lock()
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, spec), name="oldlogits-engine", daemon=True)
        self._process.start()
        theirs.close()
        self._reader = threading.Thread(target=self._read, name="oldlogits-engine-reader", daemon=True)
        self._reader.start()

    @property
    def capabilities(self) -> EngineCapabilities:
        """What this engine can do."""
        return replace(capabilities_of(self._spec), num_host_copies=1)

    @property
    def pid(self) -> int | None:
        """The engine's process id."""
        return self._process.pid

    async def ready(self) -> None:
        """Wait until the engine has loaded its weights."""
        await self._call("start")

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling, request_id: str) -> Generation:
        """Sample a completion; waits through pauses and weight updates.

        Raises:
            ConfigError: The prompt does not fit, or the id is in use.
            WorkerDiedError: The engine process ended.
        """
        check_request(prompt_ids, self._vocab_size, self._spec.max_context)
        future = self._register(self._generations, request_id)
        self._send(_Add(request_id=request_id, prompt_ids=list(prompt_ids), sampling=sampling))
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            if self._death is None:
                await self.abort(request_id)
            raise

    async def abort(self, request_id: str) -> None:
        """End a request; its `generate` returns what was sampled so far with finish reason "abort"."""
        self._send(_Abort(request_id=request_id))

    async def pause(self, mode: Literal["keep", "abort"], kv: Literal["recompute", "stale"]) -> None:
        """Stop sampling; the engine is idle on return. `kv` says what an update does with keys and values."""
        await self._call(_Pause(mode=mode, kv=kv))

    async def partials(self) -> Mapping[str, Generation]:
        """What each request has sampled so far, by request id."""
        value = await self._call("partials")
        assert isinstance(value, dict)
        return value

    async def update_weights(self, update: WeightUpdate, version: PolicyVersion) -> None:
        """Replace the weights; later tokens are tagged with `version`. Blocks while the host's copy takes them.

        Raises:
            ReceiverBehindError: Patches do not lead on from what this host holds: give full weights.
        """
        await self.load(self._weights.take(update, version), version, version)

    async def load(self, copy: Path, held: PolicyVersion, version: PolicyVersion) -> None:
        """Replace the weights by those that a `HostCopy` holds as version `held`; later tokens are tagged with `version`."""
        await self._call(_Update(copy=copy, held=held, version=version))

    async def resume(self) -> None:
        """Go on sampling."""
        await self._call("resume")

    async def stats(self) -> EngineStats:
        """The engine's counters."""
        value = await self._call("stats")
        assert isinstance(value, EngineStats)
        return value

    async def watch(self) -> None:
        """Wait until the engine process ends by itself.

        Raises:
            WorkerDiedError: It did.
        """
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self._process.sentinel, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(self._process.sentinel)
        raise _died(f"exit code {exit_code(self._process)}")

    def close(self) -> None:
        """End the process; pending calls fail. Leaves no process, thread or file."""
        self._die(_died("it was closed"))
        with contextlib.suppress(OldLogitsError):  # it may have ended already
            self._send("close")
        self._reader.join(_EXIT_S)
        if self._reader.is_alive():
            self._process.kill()
            self._reader.join()
        self._process.join()
        self._connection.close()
        self._weights.close()

    async def _call(self, action: _Action) -> _Value:
        number = next(self._numbers)
        future = self._register(self._calls, number)
        self._send(_Call(number=number, action=action))
        try:
            async with asyncio.timeout(self._control_timeout_s):  # wait_for of Python 3.11 may swallow a cancellation
                return await asyncio.wrap_future(future)
        except TimeoutError:
            self._die(_died(f"no answer to {action} within {self._control_timeout_s:g} s"))
            self._process.kill()
            assert self._death is not None
            raise copy.copy(self._death) from None

    def _register(self, pending: dict[_Key, Future[_T]], key: _Key) -> Future[_T]:
        future: Future[_T] = Future()
        future.set_running_or_notify_cancel()  # from here on only `_dispatch` and `_die` end it
        with self._lock:
            if self._death is not None:
                raise copy.copy(self._death)
            if key in pending:
                raise ConfigError("a request id is in use", got=str(key), allowed="unique ids", fix="number the turns")
            pending[key] = future
        return future

    def _send(self, message: _ToChild) -> None:
        try:
            with self._send_lock:
                self._connection.send(message)
        except OSError:
            self._reader.join(_EXIT_S)  # it finds out why
            self._die(_died("its pipe is closed"))
            assert self._death is not None
            raise copy.copy(self._death) from None

    def _read(self) -> None:
        """The reader thread: resolve futures until the pipe ends, then fail those that are left."""
        try:
            while True:
                self._dispatch(self._connection.recv())
        except (EOFError, OSError):
            self._die(_died(f"exit code {exit_code(self._process)}"))

    def _dispatch(self, message: _FromChild) -> None:
        match message:
            case _Reply(number=number, value=value):
                with self._lock:
                    call = self._calls.pop(number, None)
                _resolve(call, value)
            case _Finished(generations=generations):
                with self._lock:
                    futures = [self._generations.pop(request_id, None) for request_id, _ in generations]
                for future, (_, generation) in zip(futures, generations, strict=True):
                    _resolve(future, generation)
            case _Crashed(error=error):
                self._die(error)

    def _die(self, error: OldLogitsError) -> None:
        """The first error is the one that every pending and later call fails with."""
        with self._lock:
            self._death = self._death or error
            pending: list[Future[Generation] | Future[_Value]] = [*self._generations.values(), *self._calls.values()]
            self._generations.clear()
            self._calls.clear()
        for future in pending:
            future.set_exception(copy.copy(self._death))


def _resolve(future: Future[_T] | None, value: _T | OldLogitsError) -> None:
    """`future` is None when `_die` has failed it already."""
    if future is None:
        return
    if isinstance(value, OldLogitsError):
        future.set_exception(value)
    else:
        future.set_result(value)


def _died(how: str) -> WorkerDiedError:
    return WorkerDiedError(
        "the engine process ended or stopped answering",
        got=how,
        allowed="an engine that lives until it is closed",
        fix="read its messages on stderr; a killed process often means too little memory: lower max_num_seqs or max_context",
    )


def _serve(connection: Connection, spec: EngineSpec) -> None:
    """The engine process. It ignores SIGINT and SIGTERM: the parent decides; it ends when the pipe does."""
    name_process("engine")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    try:
        _Server(connection, EngineCore(spec)).run()
    except (EOFError, ConnectionError):
        pass  # the parent is gone
    except OldLogitsError as error:
        connection.send(_Crashed(error=error))
    except Exception as error:  # supervision: the parent hears why, then this process dies of it
        connection.send(_Crashed(error=_died("".join(traceback.format_exception_only(error)).strip())))
        raise


class _Server:
    """The loop of the engine process."""

    def __init__(self, connection: Connection, core: EngineCore) -> None:
        self._connection, self._core = connection, core
        self._copy: HostCopy | None = None
        self._waiting_s = 0.0

    def run(self) -> None:
        """Serve until told to close."""
        while True:
            while self._core.idle or self._connection.poll():
                message = self._receive()
                if message == "close":
                    return
                self._handle(message)
            self._finish(self._core.step())

    def _receive(self) -> _ToChild:
        """The next message; counts the time for which an idle engine waits for it."""
        started = time.perf_counter()
        message: _ToChild = self._connection.recv()
        if self._core.idle:
            self._waiting_s += time.perf_counter() - started
        return message

    def _handle(self, message: _Add | _Abort | _Call) -> None:
        match message:
            case _Add(request_id=request_id, prompt_ids=prompt_ids, sampling=sampling):
                try:
                    self._core.add(request_id, prompt_ids, sampling)
                except OldLogitsError as error:
                    self._finish([(request_id, error)])
            case _Abort(request_id=request_id):
                generation = self._core.abort(request_id)
                if generation is not None:
                    self._finish([(request_id, generation)])
            case _Call(number=number, action=action):
                try:
                    value: _Value | OldLogitsError = self._act(action)
                except OldLogitsError as error:
                    value = error
                self._connection.send(_Reply(number=number, value=value))

    def _act(self, action: _Action) -> _Value:
        match action:
            case _Pause(mode=mode, kv=kv):
                self._finish(self._core.pause(mode, kv))
            case _Update(copy=path, held=held, version=version):
                if self._copy is None or self._copy.path != path:
                    self._copy = HostCopy(path)
                with self._copy.read(held) as weights:
                    self._core.update_weights(weights, version)
            case "partials":
                return self._core.partials()
            case "resume":
                self._core.resume()
            case "stats":
                return replace(self._core.stats, waiting_s=self._waiting_s)
            case "start":
                pass
        return None

    def _finish(self, generations: Sequence[tuple[str, Generation | OldLogitsError]]) -> None:
        if generations:
            self._connection.send(_Finished(generations=list(generations)))
