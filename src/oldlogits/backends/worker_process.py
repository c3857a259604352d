"""A process that carries out calls, one at a time and in order, for a controller.

    controller                              worker process
    call(method, arguments) --- pipe --->   carry_out(method, arguments)
             value or error <-- pipe ----

Between processes of one user. A worker that dies fails the pending call and every later one with `WorkerDiedError`.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Connection, wait

from oldlogits.core.errors import OldLogitsError, WorkerDiedError
from oldlogits.core.processes import exit_code, name_process
from oldlogits.engines.shared_memory import unshare

CarryOut = Callable[[str, tuple[object, ...]], object]
"""Carries out one call in the worker."""


class WorkerProcess:
    """Starts a worker and carries out calls in it.

    Args:
        name: Of the worker: "trainer", "scorer".
        build: A function of a module, called in the worker: builds what carries out the calls.
        arguments: Of `build`.
    """

    def __init__(self, name: str, build: Callable[..., CarryOut], arguments: tuple[object, ...]) -> None:
        self._name = name
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        target = (name, theirs, build, arguments)
        self._process = context.Process(target=_serve, args=target, name=f"oldlogits-{name}", daemon=True)
        self._process.start()
        theirs.close()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)

    @property
    def pid(self) -> int | None:
        """Its process id."""
        return self._process.pid

    async def ready(self) -> None:
        """Wait until it is built.

        Raises:
            OldLogitsError: What the worker raised while it started.
            WorkerDiedError: It ended.
        """
        await asyncio.get_running_loop().run_in_executor(self._thread, self._receive)

    async def call(self, method: str, arguments: tuple[object, ...]) -> object:
        """Carry out a call, after those that were made before.

        Raises:
            OldLogitsError: What the call raised.
            WorkerDiedError: The worker ended.
        """
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._exchange, method, arguments)

    async def watch(self) -> None:
        """Wait until the worker ends by itself.

        Raises:
            WorkerDiedError: It did.
        """
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self._process.sentinel, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(self._process.sentinel)
        raise self._died()

    def close(self) -> None:
        """End the process, whatever it does. Leaves no process, thread or file."""
        self._process.kill()  # nothing is lost: what must last was written by a call that returned
        self._process.join()
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._pipe.close()
        assert self._process.pid is not None, "it was started"
        unshare(self._process.pid)

    def _arrived(self, value: object) -> object:
        """What a call returns, given what came through the pipe."""
        return value

    def _exchange(self, method: str, arguments: tuple[object, ...]) -> object:
        try:
            self._pipe.send((method, arguments))
        except OSError as error:
            raise self._died() from error
        return self._receive()

    def _receive(self) -> object:
        wait([self._pipe, self._process.sentinel])
        try:
            succeeded, value = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise self._died() from error
        if succeeded:
            return self._arrived(value)
        assert isinstance(value, BaseException)
        raise value

    def _died(self) -> WorkerDiedError:
        return WorkerDiedError(
            f"the {self._name} process ended",
            got=f"exit code {exit_code(self._process)}",
            allowed=f"a {self._name} that runs until the end of the run",
            fix="look for an out-of-memory kill or a message above; go on with --resume from the last checkpoint",
        )


def _serve(name: str, pipe: Connection, build: Callable[..., CarryOut], arguments: tuple[object, ...]) -> None:
    """The worker: carry out calls until the pipe closes. Ctrl-C and SIGTERM are the controller's to handle."""
    name_process(name)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    built: list[CarryOut] = []
    work: Callable[[], object] = lambda: built.append(build(*arguments))  # noqa: E731 - the first call, in effect
    while _answer(pipe, work):
        try:
            method, call_arguments = pipe.recv()
        except (EOFError, OSError):
            return
        work = partial(built[0], method, call_arguments)


def _answer(pipe: Connection, work: Callable[[], object]) -> bool:
    """Send the result of `work`, or the error of this package that it raised; False when nobody listens."""
    try:
        message: tuple[bool, object] = (True, work())
    except OldLogitsError as error:
        message = (False, error)
    try:
        pipe.send(message)
    except OSError:
        return False
    return True
