"""Agent programs of one episode each: a function of Python, or a command in any language.

function(base_url, api_key, row) -> reward, or {"reward": ...}
command: OPENAI_BASE_URL, OPENAI_API_KEY, ANTHROPIC_BASE_URL, ANTHROPIC_API_KEY; the row on standard input;
         the last line of standard output is {"reward": ...}
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext, suppress
from functools import partial
from typing import Final, Protocol, cast

from oldlogits.core.environment import Program, ServedProgram
from oldlogits.core.errors import RolloutError
from oldlogits.envs.text import readable, write_json
from oldlogits.rollout.answers import reward_of
from oldlogits.rollout.environment_errors import EnvironmentFailed
from oldlogits.rollout.environment_runner import attempt, finished
from oldlogits.rollout.gateway.listener import Address

_LAUNCH: Final = (
    "/bin/sh",
    "-c",
    """
    ( while kill -0 "$0"; do sleep 1; done; kill -9 0 ) </dev/null >/dev/null 2>&1 &
    [ "$1" = 0 ] || ulimit -v "$1" || exit 125
    shift; exec "$@"
    """,
)
"""Runs a command, with a limit of address space in KiB, until it or process $0 ends; the group ends with that process."""

_LONGEST_LINE: Final = 1 << 20
_TOLD: Final = 2000
"""Characters of standard error that a failure quotes."""


class Runner(Protocol):
    """Runs an agent program."""

    def opened(self) -> AbstractAsyncContextManager[None]:
        """Hold what its episodes share."""
        return nullcontext()

    async def run(self, address: Address) -> float:
        """Play one episode; return its reward.

        Raises:
            EnvironmentFailed: It failed, or took too long.
        """


class FunctionRunner(Runner):
    """A function of Python, asynchronous or not; asynchronous ones share an event loop, the others have a thread each.

    Args:
        function: Called with base URL, API key and row.
        timeout_s: Seconds that an episode may take.
    """

    def __init__(self, function: Program, *, timeout_s: float) -> None:
        self._function, self._timeout_s = function, timeout_s
        self._loop: asyncio.AbstractEventLoop | None = None

    async def run(self, address: Address) -> float:
        """Call the function; one that does not return in time is cancelled, or left to itself where it has a thread."""
        call = partial(self._function, address.base_url, address.key, address.row)
        is_async = inspect.iscoroutinefunction(self._function) or inspect.iscoroutinefunction(
            getattr(self._function, "__call__", None)  # noqa: B004 - an object that is called
        )
        future = self._started(call) if is_async else _in_thread(call)
        try:
            async with asyncio.timeout(self._timeout_s):
                value = await asyncio.wrap_future(future)
        except TimeoutError as error:
            raise EnvironmentFailed(f"the program timed out after {self._timeout_s:g} s") from error
        finally:
            future.cancel()
        return _reward(value)

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """Hold what the function shares among its episodes, from one task of its event loop.

        Raises:
            RolloutError: It cannot be opened.
        """
        if not isinstance(self._function, ServedProgram):
            yield
            return
        serving, is_open, ending = self._function.serving, Future[None](), asyncio.Event()

        async def hold() -> None:
            async with serving():
                is_open.set_result(None)
                await ending.wait()

        holding = asyncio.wrap_future(self._started(hold))
        try:
            await asyncio.wait({holding, asyncio.wrap_future(is_open)}, return_when=asyncio.FIRST_COMPLETED)
            if holding.done():
                holding.result()
            yield
        except EnvironmentFailed as error:
            allowed, fix = "servers that start", "see what it says"
            raise RolloutError("what all episodes share cannot be opened", got=str(error), allowed=allowed, fix=fix) from error
        finally:
            cast("asyncio.AbstractEventLoop", self._loop).call_soon_threadsafe(ending.set)
            await asyncio.gather(holding, return_exceptions=True)

    def _started(self, call: Callable[[], object]) -> Future[object]:
        """Start an asynchronous function on the loop of its kind."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, name="oldlogits-programs", daemon=True).start()

        async def carry_out() -> object:
            return await finished(cast("Awaitable[object]", attempt(call)))

        return asyncio.run_coroutine_threadsafe(carry_out(), self._loop)


def _in_thread(call: Callable[[], object]) -> Future[object]:
    future: Future[object] = Future()

    def carry_out() -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            value = attempt(call)
        except BaseException as error:  # told where it is waited for
            future.set_exception(error)
        else:
            future.set_result(value)

    threading.Thread(target=carry_out, name="oldlogits-program", daemon=True).start()
    return future


class CommandRunner(Runner):
    """A command, with a process group and a working folder for each episode, which end with it.

    Args:
        command: The command and its arguments.
        timeout_s: Seconds that an episode may take.
        memory_bytes: Address space of each of its processes; 0: without a limit.
    """

    def __init__(self, command: Sequence[str], *, timeout_s: float, memory_bytes: int = 0) -> None:
        self._command, self._timeout_s, self._memory_bytes = tuple(command), timeout_s, memory_bytes

    async def run(self, address: Address) -> float:
        """Run the command; what is left of its process group is killed, at its end or at its deadline."""
        folder = tempfile.mkdtemp(prefix="oldlogits-episode-")
        try:
            return await self._run(address, folder)
        finally:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    async def _run(self, address: Address, folder: str) -> float:
        try:
            process = await asyncio.create_subprocess_exec(
                *_LAUNCH,
                str(os.getpid()),
                str(self._memory_bytes >> 10),
                *self._command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                cwd=folder,
                env=_environment(address),
                start_new_session=True,
            )
        except OSError as error:
            raise EnvironmentFailed(f"{self._command[0]} cannot be started: {error}") from error
        pipes = cast("tuple[asyncio.StreamReader, asyncio.StreamReader]", (process.stdout, process.stderr))
        out, said = (asyncio.create_task(_tail(pipe)) for pipe in pipes)
        row = write_json(address.row).encode() + b"\n"
        giving = asyncio.create_task(_give(cast("asyncio.StreamWriter", process.stdin), row))
        try:
            async with asyncio.timeout(self._timeout_s):
                status = await process.wait()
        except TimeoutError as error:
            heard = _quoted(await _killed(process, said))
            raise EnvironmentFailed(f"the program timed out after {self._timeout_s:g} s{heard}") from error
        finally:
            giving.cancel()
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with suppress(ProcessLookupError):
                await process.wait()
        printed, told = await out, await said
        if status:
            how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
            raise EnvironmentFailed(f"the program {how}{_quoted(told)}")
        return _reward(_last_object(printed, told))


async def _killed(process: asyncio.subprocess.Process, said: asyncio.Task[bytes]) -> bytes:
    """Kill a process group; return the end of what it said."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return await said


async def _give(stdin: asyncio.StreamWriter, text: bytes) -> None:
    """Write the row; a program need not read it."""
    with suppress(ConnectionError):
        stdin.write(text)
        await stdin.drain()
        stdin.close()


async def _tail(stream: asyncio.StreamReader) -> bytes:
    """Read a stream to its end, and keep the end of it."""
    kept = b""
    while chunk := await stream.read(1 << 16):
        kept = (kept + chunk)[-_LONGEST_LINE:]
    return kept


def _last_object(printed: bytes, told: bytes) -> object:
    lines = printed.decode(errors="replace").strip().splitlines()
    try:
        return json.loads(lines[-1])
    except (IndexError, ValueError, RecursionError) as error:
        last = f"its last line is {lines[-1]!r:.200}" if lines else "it printed nothing"
        raise EnvironmentFailed(f'the program printed no {{"reward": ...}}: {last}{_quoted(told)}') from error


def _quoted(told: bytes) -> str:
    text = readable(told.decode(errors="replace")).strip()
    return f"; it said: ...{text[-_TOLD:]}" if len(text) > _TOLD else f"; it said: {text}" if text else ""


def _reward(value: object) -> float:
    """The reward of what a program gave: a number, or an object with one.

    Raises:
        EnvironmentFailed: It is none.
    """
    if isinstance(value, dict):
        if "reward" not in value:
            raise EnvironmentFailed(f"the program gave no reward: {sorted(map(str, value))[:20]}")
        value = value["reward"]
    return reward_of(value, "the program")


def _environment(address: Address) -> dict[str, str]:
    beside = ",".join(filter(None, [os.environ.get("NO_PROXY", ""), "127.0.0.1"]))
    return {
        **os.environ,
        "OPENAI_BASE_URL": address.base_url,
        "OPENAI_API_KEY": address.key,
        "ANTHROPIC_BASE_URL": address.root,
        "ANTHROPIC_API_KEY": address.key,
        "NO_PROXY": beside,
        "no_proxy": beside,
    }
