"""A process of its own for the functions of agent programs: their clients take as much time as the run's own controller.

    controller --{"number", "root", "key", "row"}--> worker: an event loop, and threads for plain functions
               <--{"number", "reward" | "failed", "is_lost"}--
               --{"cancel": number}-->   <--{"note": a warning}--

An asynchronous function that blocks the event loop fails at its deadline; the others begin again on another one. A worker that
answers nothing, or dies, fails its episodes; the next one starts another worker.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import signal
import socket
import sys
import traceback
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Final, cast

from oldlogits.core.environment import PROGRAMS, ProgramSource, ServedProgram
from oldlogits.core.errors import RolloutError
from oldlogits.envs.base import load_environment
from oldlogits.envs.text import write_json
from oldlogits.rollout.environment_errors import EnvironmentFailed, EnvironmentLost
from oldlogits.rollout.environment_runner import blocking_place, environment_loop
from oldlogits.rollout.gateway.programs import Address, FunctionRunner, Runner, timed_out

_GRACE_S: Final = 5.0
_MOST_BYTES: Final = 1 << 28
"""The longest line."""
_QUOTED: Final = 2000
_HELD_S: Final = 2.0
"""Seconds without a turn of the event loop after which the code that holds it is told of, once."""
_READY: Final = b"ready\n"
_PR_SET_PDEATHSIG: Final = 1


class WorkerRunner(Runner):
    """Runs a function of Python in a process that is started with its first episode.

    Args:
        target: "package.module:function", or what the adapter makes an environment of that has a program.
        adapter: The name of that adapter; empty: the target is a function.
        log: A file to which is added what the functions print.
        timeout_s: Seconds that an episode may take.
    """

    def __init__(self, target: str, adapter: str = "", *, log: Path, timeout_s: float) -> None:
        self._words, self._log, self._timeout_s = (target, adapter, str(timeout_s)), log, timeout_s
        self._worker: _Worker | None = None
        self._starting = asyncio.Lock()
        self.notes = []

    async def open(self) -> None:
        """Start the process, and wait until it has imported the function."""
        await self._started()

    async def run(self, address: Address) -> float:
        """Play one episode."""
        try:
            worker = await self._started()
        except RolloutError as error:
            raise EnvironmentFailed(str(error)) from error
        try:
            async with asyncio.timeout(self._timeout_s + _GRACE_S):
                return await worker.play(address)
        except TimeoutError as error:
            await worker.end("the process of agent programs was killed: it answered nothing")
            raise timed_out(self._timeout_s, ", and its process with it") from error

    async def _started(self) -> _Worker:
        async with self._starting:
            if self._worker is not None and self._worker.has_ended:
                await self.close()
            if self._worker is None:
                self._worker = await _Worker.start(self._words, self._log, self.notes)
            return self._worker

    async def close(self) -> None:
        """End the process."""
        if self._worker is not None:
            await self._worker.end("the run is over")
            self._worker = None


class SpreadRunner(Runner):
    """Shares episodes out among workers: each goes to the one that plays the fewest."""

    def __init__(self, workers: Sequence[Runner]) -> None:
        self.notes = []
        for worker in workers:
            worker.notes = self.notes
        self._num_playing = dict.fromkeys(workers, 0)

    async def open(self) -> None:
        """Start them all."""
        await asyncio.gather(*(worker.open() for worker in self._num_playing))

    async def run(self, address: Address) -> float:
        """Play one episode."""
        worker = min(self._num_playing, key=self._num_playing.__getitem__)
        self._num_playing[worker] += 1
        try:
            return await worker.run(address)
        finally:
            self._num_playing[worker] -= 1

    async def close(self) -> None:
        """End them all."""
        await asyncio.gather(*(worker.close() for worker in self._num_playing))


class _Worker:
    """A process, and the episodes that wait for its answers."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        notes: list[str],
    ) -> None:
        self._process, self._writer, self._notes = process, writer, notes
        self._numbers = count()
        self._waiting: dict[int, asyncio.Future[float]] = {}
        self._reading = asyncio.create_task(self._read(reader))
        self.has_ended = False

    @classmethod
    async def start(cls, words: Sequence[str], log: Path, notes: list[str]) -> _Worker:
        """Start a process; it tells when it is ready.

        Raises:
            RolloutError: It ended before.
        """
        ours, theirs = socket.socketpair()
        with theirs, log.open("ab") as printed:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "oldlogits.rollout.gateway.worker", str(theirs.fileno()), *words),
                pass_fds=(theirs.fileno(),),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=printed,
                stderr=printed,
                start_new_session=True,
            )
        reader, writer = await asyncio.open_connection(sock=ours, limit=_MOST_BYTES)
        if await reader.readline() != _READY:
            worker = cls(process, reader, writer, notes)
            await worker.end("it did not start")
            said = log.read_bytes()[-_QUOTED:].decode(errors="replace").strip()
            fix, allowed = f"see {log}", "a program that can be imported, and servers that start"
            raise RolloutError("the process of agent programs did not start", got=said, allowed=allowed, fix=fix)
        return cls(process, reader, writer, notes)

    async def play(self, address: Address) -> float:
        """Have one episode played."""
        if self.has_ended:
            raise EnvironmentFailed("the process of agent programs has ended")
        number = next(self._numbers)
        self._waiting[number] = asyncio.get_running_loop().create_future()
        self._tell({"number": number, "root": address.root, "key": address.key, "row": address.row})
        try:
            return await self._waiting[number]
        finally:
            if not self._waiting.pop(number).done():
                self._tell({"cancel": number})

    async def end(self, reason: str) -> None:
        """Kill the process; episodes that wait for it fail."""
        self._fail(reason)
        with suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()
        await asyncio.gather(self._reading, return_exceptions=True)
        self._writer.close()
        with suppress(ConnectionError):
            await self._writer.wait_closed()

    def _tell(self, said: dict[str, object]) -> None:
        if not self.has_ended:
            self._writer.write(write_json(said).encode() + b"\n")

    def _fail(self, reason: str) -> None:
        self.has_ended = True
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(EnvironmentFailed(reason))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while line := await reader.readline():
                answer = json.loads(line)
                if "note" in answer:
                    self._notes.append(answer["note"])
                    continue
                future = self._waiting.get(answer["number"])
                if future is None or future.done():
                    continue
                if "reward" in answer:
                    future.set_result(answer["reward"])
                else:
                    kind = EnvironmentLost if answer["is_lost"] else EnvironmentFailed
                    future.set_exception(kind(answer["failed"]))
        except (ConnectionError, ValueError) as error:
            self._fail(f"the process of agent programs: {error}")
        self._fail(f"the process of agent programs ended with status {await self._process.wait()}")


async def serve(fd: int, target: str, adapter: str, timeout_s: float) -> None:
    """Play what is asked for until the other end is closed."""
    program = cast(ProgramSource, load_environment(target, adapter)).program if adapter else PROGRAMS.find(target)
    runner = FunctionRunner(program, timeout_s=timeout_s)
    reader, writer = await asyncio.open_connection(sock=socket.socket(fileno=fd), limit=_MOST_BYTES)
    playing: dict[int, asyncio.Task[None]] = {}

    async def play(number: int, address: Address) -> None:
        try:
            answer: dict[str, object] = {"reward": await runner.run(address)}
        except EnvironmentFailed as failure:
            answer = {"failed": str(failure), "is_lost": isinstance(failure, EnvironmentLost)}
            if failure.__cause__ is not None:
                traceback.print_exception(failure.__cause__)  # into the log
        writer.write(json.dumps({"number": number, **answer}).encode() + b"\n")

    async def tell_of_blocking() -> None:
        place = await blocking_place(_HELD_S)
        note = (
            f"{place} blocks the event loop that all episodes share: they wait for each other; await what it does, run it with "
            "asyncio.to_thread, or write `def` for `async def`, which has a thread for each episode"
        )
        writer.write(json.dumps({"note": note}).encode() + b"\n")

    async with shared_by(program):
        writer.write(_READY)
        telling = asyncio.create_task(tell_of_blocking())
        while line := await reader.readline():
            asked = json.loads(line)
            if "cancel" in asked:
                if asked["cancel"] in playing:
                    playing[asked["cancel"]].cancel()
                continue
            number, address = asked["number"], Address(root=asked["root"], key=asked["key"], row=asked["row"])
            task = playing[number] = asyncio.create_task(play(number, address))
            task.add_done_callback(lambda _, number=number: playing.pop(number, None))  # type: ignore[misc]
        telling.cancel()


@asynccontextmanager
async def shared_by(program: object) -> AsyncIterator[None]:
    """Hold what a program shares among its episodes, from one task of the event loop on which they run."""
    if not isinstance(program, ServedProgram):
        yield
        return
    is_open, ending = Future[None](), asyncio.Event()

    async def hold() -> None:
        async with program.serving():
            is_open.set_result(None)
            await ending.wait()

    loop = environment_loop()
    holding = asyncio.wrap_future(asyncio.run_coroutine_threadsafe(hold(), loop))
    try:
        await asyncio.wait({holding, asyncio.wrap_future(is_open)}, return_when=asyncio.FIRST_COMPLETED)
        if holding.done():
            holding.result()
        yield
    finally:
        loop.call_soon_threadsafe(ending.set)
        await asyncio.gather(holding, return_exceptions=True)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is the controller's to handle
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    asyncio.run(serve(int(sys.argv[1]), sys.argv[2], sys.argv[3], float(sys.argv[4])))
