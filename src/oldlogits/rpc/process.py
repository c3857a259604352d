"""The parent's end of a pipe: a child process, and the calls that wait for its replies.

A child that ends, falls silent, or whose answers cannot be read, fails every pending and every later call with the same error.

    event loop              writer thread          child             reader thread
    call -> outbox ------->  encode, send  ------>  carries out ----> decode, resolve the future
                             (next call, when this one is answered, unless calls are pipelined)
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import itertools
import multiprocessing
import threading
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.reduction import ForkingPickler
from queue import SimpleQueue
from typing import Final

from oldlogits.core.errors import OldLogitsError, WorkerDiedError
from oldlogits.rpc.child import BEAT_S, READY, Call, Codec, Reply, died, run_child
from oldlogits.rpc.processes import exit_code

FIRST_BEAT_S: Final = 300.0
"""Seconds until the first heartbeat: a child imports its packages before it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Post:
    call: Call
    future: Future[object]


class ChildProcess:
    """Starts a child process, and is the transport of calls to it.

    The constructor returns at once; calls wait until the child is built. A call that is cancelled before it was sent is never
    carried out; the result of one that is cancelled later is dropped.

    Args:
        name: What the process is, such as "trainer"; the system lists it under this name, and errors tell it.
        serve: A function of a module, called in the child with its `Inbox` and `arguments`; `serve_calls`, for example.
        fix: What an error advises when the process ends by itself.
        is_pipelined: Whether a call is sent before those made earlier are answered.
        heartbeat_timeout_s: A child that gives no heartbeat for so many seconds is frozen: it is killed.
    """

    def __init__(
        self,
        name: str,
        serve: Callable[..., None],
        arguments: tuple[object, ...],
        *,
        fix: str,
        codec: Codec | None = None,
        is_pipelined: bool = False,
        heartbeat_timeout_s: float = 60.0,
    ) -> None:
        self._patience_s, self._heartbeat_timeout_s = max(FIRST_BEAT_S, heartbeat_timeout_s), heartbeat_timeout_s
        self.name, self._fix, self._codec, self._is_pipelined = name, fix, codec or Codec(), is_pipelined
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()  # guards the next two
        self._pending: dict[int, Future[object]] = {}
        self._death: OldLogitsError | None = None
        self._outbox: SimpleQueue[_Post | None] = SimpleQueue()
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        target = (name, theirs, self._codec, serve, arguments, fix)
        self._process = context.Process(target=run_child, args=target, name=f"oldlogits-{name}", daemon=True)
        self._process.start()
        theirs.close()
        self._threads = [
            threading.Thread(target=target, name=f"oldlogits-{name}-{target.__name__.strip('_')}", daemon=True)
            for target in (self._write, self._read)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def pid(self) -> int:
        """The process id of the child."""
        assert self._process.pid is not None, "it was started"
        return self._process.pid

    async def ready(self) -> None:
        """Wait until the child is built; raises what it raised while it started."""
        await self.call(READY, ())

    async def call(self, method: str, arguments: tuple[object, ...]) -> object:
        """Call a method, after those that were called before.

        Raises:
            OldLogitsError: What the method raised.
            WorkerDiedError: The child ended.
        """
        return await asyncio.wrap_future(self._post(next(self._numbers), method, arguments))

    def tell(self, method: str, arguments: tuple[object, ...]) -> None:
        """Call a method whose answer nobody waits for; a child that has ended is not told."""
        self._outbox.put(_Post(call=Call(number=0, method=method, arguments=arguments), future=Future()))

    async def watch(self) -> None:
        """Wait until the child ends by itself.

        Raises:
            OldLogitsError: It did; this says why.
        """
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self._process.sentinel, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(self._process.sentinel)
        await asyncio.to_thread(self._threads[1].join)  # it finds out why
        assert self._death is not None, "the reader ends by an end of the child"
        raise copy.copy(self._death)

    def give_up(self, how: str) -> WorkerDiedError:
        """Kill a child that does not answer (`how`): pending and later calls fail."""
        error = died(self.name, how, self._fix)
        self._die(error)
        self._process.kill()
        return error

    def close(self) -> None:
        """End the child, whatever it does; pending calls fail. Leaves no process and no thread; a second call does nothing."""
        self._die(died(self.name, "it was closed", self._fix))
        self._process.kill()  # nothing is lost: what must last was written by a call that returned
        self._process.join()
        self._outbox.put(None)
        for thread in self._threads:
            thread.join()
        self._pipe.close()

    def _post(self, number: int, method: str, arguments: tuple[object, ...]) -> Future[object]:
        future: Future[object] = Future()
        with self._lock:
            if self._death is not None:
                raise copy.copy(self._death)
            self._pending[number] = future
        self._outbox.put(_Post(call=Call(number=number, method=method, arguments=arguments), future=future))
        return future

    def _write(self) -> None:
        """The writer thread: send calls until the end of the child, then let go of those that are left."""
        while (post := self._outbox.get()) is not None:
            if not self._begin(post):
                continue
            try:
                arguments = tuple(self._codec.encode(argument) for argument in post.call.arguments)
                call = Call(number=post.call.number, method=post.call.method, arguments=arguments)
                message = ForkingPickler.dumps(call)
            except Exception as error:  # supervision: an argument that cannot be sent is the caller's error, and it hears of it
                self._take(post.call.number)
                post.future.set_exception(error)
                continue
            try:
                self._pipe.send_bytes(message)
            except OSError as error:
                if not isinstance(error, ConnectionError):  # then the child has ended, and the reader tells why
                    self.give_up(f"a call that cannot be sent: {error}")
            if post.call.number and not self._is_pipelined:
                wait_for([post.future])

    def _begin(self, post: _Post) -> bool:
        """Whether a call is to be sent: not if it was cancelled, or has failed with the child."""
        with self._lock:
            if self._death is not None:
                return False
            if post.future.set_running_or_notify_cancel():
                return True
            del self._pending[post.call.number]
            return False

    def _read(self) -> None:
        """The reader thread: resolve futures until the child ends, then fail those that are left."""
        try:
            while (replies := self._receive()) is not None:
                for reply in replies:
                    self._resolve(reply)
            self._die(died(self.name, self._exit(), self._fix))
        except TimeoutError as error:
            self.give_up(str(error))
        except Exception as error:  # supervision: whatever makes an answer unreadable, there will be no other one
            self.give_up(f"an answer that cannot be read: {type(error).__name__}: {error}")

    def _receive(self) -> list[Reply] | None:
        """The next replies; none: a heartbeat; None: the child has ended. A frozen one is a `TimeoutError`."""
        silent_s = 0.0  # of waits, not of the clock: where this process was frozen too, that counts as one
        while not (ready := wait([self._pipe, self._process.sentinel], BEAT_S)):
            silent_s += BEAT_S
            if silent_s >= self._patience_s:
                raise TimeoutError(f"no heartbeat for {silent_s:g} s: it is frozen")
        if self._pipe not in ready:
            return None
        try:
            replies: list[Reply] = self._pipe.recv()
        except (EOFError, OSError):
            return None
        self._patience_s = self._heartbeat_timeout_s
        return replies

    def _resolve(self, reply: Reply) -> None:
        value = self._codec.decode(reply.value)  # here, where no cancellation can leave behind what was put aside
        if not reply.number:
            assert reply.error is not None, "last words are an error"
            self._die(reply.error)
            return
        future = self._take(reply.number)
        if future is None:  # it has failed with the child
            return
        with contextlib.suppress(InvalidStateError):
            future.set_result(value) if reply.error is None else future.set_exception(reply.error)

    def _take(self, number: int) -> Future[object] | None:
        with self._lock:
            return self._pending.pop(number, None)

    def _die(self, error: OldLogitsError) -> None:
        """The first error is the one that every pending and later call fails with."""
        with self._lock:
            self._death = self._death or error
            pending = list(self._pending.values())
            self._pending.clear()
        for future in pending:
            with contextlib.suppress(InvalidStateError):  # it was cancelled
                future.set_exception(copy.copy(self._death))

    def _exit(self) -> str:
        return f"exit code {exit_code(self._process)}"


class Deadline:
    """A transport that kills a child which does not answer a call, and those before it, within `timeout_s`."""

    def __init__(self, process: ChildProcess, timeout_s: float) -> None:
        self._process, self.timeout_s = process, timeout_s

    async def call(self, method: str, arguments: tuple[object, ...]) -> object:
        """Call a method."""
        try:
            async with asyncio.timeout(self.timeout_s):  # wait_for of Python 3.11 may swallow a cancellation
                return await self._process.call(method, arguments)
        except TimeoutError:
            raise self._process.give_up(f"no answer to {method or 'the first call'} within {self.timeout_s:g} s") from None
