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
from asyncio.subprocess import SubprocessStreamProtocol
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Final, Protocol, cast

from oldlogits.core.environment import Program, Row
from oldlogits.envs.text import readable, write_json
from oldlogits.rollout.answers import reward_of
from oldlogits.rollout.environment_errors import EnvironmentFailed
from oldlogits.rollout.environment_runner import attempt, in_time

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
_LAST_WORDS_S: Final = 2.0
"""Seconds that the pipes of a process that ended are still read: they stay open in one that left its process group."""
_TOLD: Final = 2000
"""Characters of standard error that a failure quotes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """How the program of one episode reaches the run.

    Args:
        root: The base URL of Anthropic's clients.
        key: The API key.
        row: The task.
    """

    root: str
    key: str
    row: Row

    @property
    def base_url(self) -> str:
        """The base URL of OpenAI's clients."""
        return f"{self.root}/v1"


class Runner(Protocol):
    """Runs an agent program."""

    notes: list[str]
    """What its user should know, for whoever plays to take."""

    async def run(self, address: Address) -> float:
        """Play one episode; return its reward.

        Raises:
            EnvironmentFailed: It failed, or took too long.
        """

    async def open(self) -> None:
        """Start what all episodes share.

        Raises:
            RolloutError: It cannot be started.
        """
        return

    async def close(self) -> None:
        """Leave nothing running."""
        return


class FunctionRunner(Runner):
    """A function of Python: an asynchronous one runs on this event loop, any other one in a thread of its own.

    Args:
        function: Called with base URL, API key and row.
        timeout_s: Seconds that an episode may take.
    """

    def __init__(self, function: Program, *, timeout_s: float) -> None:
        self._function, self._timeout_s, self.notes = function, timeout_s, []

    async def run(self, address: Address) -> float:
        """Call the function; one that does not return in time is cancelled, or left to itself where it has a thread."""
        call = partial(self._function, address.base_url, address.key, address.row)
        is_async = inspect.iscoroutinefunction(self._function) or inspect.iscoroutinefunction(
            getattr(self._function, "__call__", None)  # noqa: B004 - an object that is called
        )
        late = timed_out(self._timeout_s)
        value = attempt(call) if is_async else await self._in_thread(call, late)
        return _reward(await in_time(value, self._timeout_s, late) if inspect.isawaitable(value) else value)

    async def _in_thread(self, call: Callable[[], object], late: EnvironmentFailed) -> object:
        future = _in_thread(call)
        try:
            async with asyncio.timeout(self._timeout_s):
                return await asyncio.wrap_future(future)
        except TimeoutError as error:
            raise late from error
        finally:
            future.cancel()


def timed_out(after_s: float, said: str = "") -> EnvironmentFailed:
    """The failure of a program that took too long, and what it said."""
    return EnvironmentFailed(f"the program timed out after {after_s:g} s (env.program_timeout_s){said}")


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
        self.notes = []

    async def run(self, address: Address) -> float:
        """Run the command; what is left of its process group is killed, at its end or at its deadline."""
        folder = tempfile.mkdtemp(prefix="oldlogits-episode-")
        try:
            return await self._run(address, folder)
        finally:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    async def _run(self, address: Address, folder: str) -> float:
        loop = asyncio.get_running_loop()
        try:
            transport, process = await loop.subprocess_exec(
                lambda: _Process(limit=1 << 16, loop=loop),
                *_LAUNCH,
                str(os.getpid()),
                str(self._memory_bytes >> 10),
                *self._command,
                cwd=folder,
                env=_environment(address),
                start_new_session=True,
            )
        except OSError as error:
            raise EnvironmentFailed(f"{self._command[0]} cannot be started: {error}") from error
        out, said = _Tail(cast("asyncio.StreamReader", process.stdout)), _Tail(cast("asyncio.StreamReader", process.stderr))
        row = write_json(address.row).encode() + b"\n"
        giving = asyncio.create_task(_give(cast("asyncio.StreamWriter", process.stdin), row))
        is_late = False
        try:
            async with asyncio.timeout(self._timeout_s):
                await process.exited.wait()
        except TimeoutError:
            is_late = True
        finally:
            giving.cancel()
            with suppress(ProcessLookupError):
                os.killpg(transport.get_pid(), signal.SIGKILL)
            try:
                await process.exited.wait()
                await asyncio.wait({out.reading, said.reading}, timeout=_LAST_WORDS_S)
            finally:
                out.reading.cancel()
                said.reading.cancel()
                transport.close()
        if is_late:
            raise timed_out(self._timeout_s, _quoted(said.kept))
        if status := cast(int, transport.get_returncode()):
            how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
            raise EnvironmentFailed(f"the program {how}{_quoted(said.kept)}")
        return _reward(_last_object(out.kept, said.kept))


class _Process(SubprocessStreamProtocol):
    """A process that has `exited` when it has: its pipes may stay open in one that left its process group."""

    def __init__(self, limit: int, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(limit, loop)
        self.exited = asyncio.Event()

    def process_exited(self) -> None:
        """Tell who waits."""
        super().process_exited()
        self.exited.set()


class _Tail:
    """Reads a stream to its end; the end of what was read is `kept`."""

    def __init__(self, stream: asyncio.StreamReader) -> None:
        self.kept = b""
        self.reading = asyncio.create_task(self._read(stream))

    async def _read(self, stream: asyncio.StreamReader) -> None:
        while chunk := await stream.read(1 << 16):
            self.kept = (self.kept + chunk)[-_LONGEST_LINE:]


async def _give(stdin: asyncio.StreamWriter, text: bytes) -> None:
    """Write the row; a program need not read it."""
    with suppress(ConnectionError):
        stdin.write(text)
        await stdin.drain()
        stdin.close()


def _last_object(printed: bytes, told: bytes) -> object:
    lines = printed.decode(errors="replace").strip().splitlines()
    try:
        return json.loads(lines[-1])
    except (IndexError, ValueError, RecursionError) as error:
        last = f"its last line is {lines[-1]!r:.200}" if lines else "it printed nothing"
        raise EnvironmentFailed(f'the program printed no {{"reward": ...}}: {last}{_quoted(told)}') from error


def _quoted(told: bytes) -> str:
    text = readable(told.decode(errors="replace")).strip()
    before, _, last = text.rpartition("\n")
    return (f"; it said: {last[-_TOLD:]}" if last else "") + (f"; before that: {before[-_TOLD:]}" if before else "")


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
