"""The child's end of a pipe: calls come in, replies go out.

The pipe is private to two processes of one user and carries pickles.

    parent: ChildProcess --Call--> Inbox.receive -> carry out -> Inbox.reply --replies--> parent
                                   Inbox.beat, once a second, beside whatever is carried out
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Final, cast

from oldlogits.core.errors import OldLogitsError, WorkerDiedError
from oldlogits.rpc.client import CarryOut
from oldlogits.rpc.processes import keep_what_is_built, name_process

READY: Final = ""
"""The name of the call that every child answers once it is built."""

BEAT_S: Final = 1.0
"""Seconds between the heartbeats of a child, and between two looks at whether its parent lives."""
LEAVE_S: Final = 5.0
"""Seconds that a child without a parent has to end in order, as it does when it finds its pipe closed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A call on its way to the child; a reply repeats its number, and to number 0 there is none."""

    number: int
    method: str
    arguments: tuple[object, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What a call returned or raised; number 0: the last words of a child that ends by an error."""

    number: int
    value: object = None
    error: OldLogitsError | None = None


class Codec:
    """Says what travels in place of a value, at both ends of a pipe: here the value itself.

    A subclass puts aside what is too large for a pipe, such as weights. It decodes a value exactly once, in the process that
    receives it.
    """

    def encode(self, value: object) -> object:
        """Return what travels in place of an argument or a returned value."""
        return value

    def decode(self, value: object) -> object:
        """Return the value itself."""
        return value


class PipeClosedError(Exception):
    """The parent is gone, or has closed its end."""


class Inbox:
    """The calls that a child is to carry out, and the way back for their replies; both ends use the same codec."""

    def __init__(self, pipe: Connection, codec: Codec) -> None:
        self._pipe, self._codec = pipe, codec
        self._sending = threading.Lock()

    def poll(self) -> bool:
        """Whether a call waits."""
        try:
            return self._pipe.poll()
        except OSError as error:
            raise PipeClosedError from error

    def receive(self) -> Call:
        """Wait for the next call; `PipeClosedError` says that there will be none."""
        try:
            call = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise PipeClosedError from error
        if not isinstance(call, Call):
            raise TypeError(f"{type(call).__name__} on the pipe where a call is due")
        arguments = tuple(self._codec.decode(argument) for argument in call.arguments)
        return Call(number=call.number, method=call.method, arguments=arguments)

    def reply(self, replies: Sequence[Reply]) -> None:
        """Send what became of calls; those that want no reply are left out."""
        wanted = [
            Reply(number=reply.number, value=self._codec.encode(reply.value), error=reply.error)
            for reply in replies
            if reply.number
        ]
        if wanted:
            self._send(wanted)

    def beat(self) -> None:
        """Say that this process lives: a message without replies."""
        self._send([])

    def last_words(self, error: OldLogitsError) -> None:
        """Say why this process ends."""
        self._send([Reply(number=0, error=error)])

    def _send(self, replies: list[Reply]) -> None:
        try:
            with self._sending:
                self._pipe.send(replies)
        except OSError as error:
            raise PipeClosedError from error


def answer(call: Call, carry_out: CarryOut) -> Reply:
    """Carry out a call; an error of this package becomes its reply, any other one ends the process."""
    if call.method == READY:
        keep_what_is_built()
        return Reply(number=call.number)
    try:
        return Reply(number=call.number, value=carry_out(call.method, call.arguments))
    except OldLogitsError as error:
        return Reply(number=call.number, error=error)


def serve_calls(inbox: Inbox, build: Callable[..., CarryOut], arguments: tuple[object, ...]) -> None:
    """Carry out calls, one at a time and in their order, until the pipe closes; `build` makes what carries them out."""
    carry_out = build(*arguments)
    while True:
        inbox.reply([answer(inbox.receive(), carry_out)])


def run_child(
    name: str, pipe: Connection, codec: Codec, serve: Callable[..., None], arguments: tuple[object, ...], fix: str
) -> None:
    """Be a child process, until the pipe closes or the parent is gone. Ctrl-C and SIGTERM are the parent's to handle."""
    name_process(name)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    inbox = Inbox(pipe, codec)
    threading.Thread(target=_keep_beating, args=(inbox, _parent()), name="heartbeat", daemon=True).start()
    try:
        serve(inbox, *arguments)
    except PipeClosedError:
        pass
    except OldLogitsError as error:
        inbox.last_words(error)
    except Exception as error:  # supervision: the parent hears why, then this process dies of it
        inbox.last_words(died(name, "".join(traceback.format_exception_only(error)).strip(), fix))
        raise


def _parent() -> int:
    parent = multiprocessing.parent_process()
    assert parent is not None, "a child of multiprocessing has one"
    return cast(int, parent.pid)


def _keep_beating(inbox: Inbox, parent: int) -> None:
    """Give heartbeats; end this process after its parent, even where what that has forked keeps the pipe open."""
    while os.getppid() == parent:
        with contextlib.suppress(PipeClosedError):  # the parent is ending
            inbox.beat()
        time.sleep(BEAT_S)
    time.sleep(LEAVE_S)
    os._exit(0)


def died(name: str, how: str, fix: str) -> WorkerDiedError:
    """The error of calls to a child that has ended."""
    return WorkerDiedError(f"the {name} process ended", got=how, allowed=f"a {name} process that lives until the end", fix=fix)
