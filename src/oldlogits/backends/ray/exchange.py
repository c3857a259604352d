"""Requests to an actor that travel together, and so do their answers: a call of an actor costs more than most of what is asked.

    controller                                       actor
    ask, ask, ... --those of LINGER_S--> exchange -> begins them; answers that are there, of whatever requests
                                                <-- of those that still run, the next exchange brings the answers

While requests run, at least one exchange is on its way: a slow request holds up no other one.
"""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Awaitable, Callable, Mapping, Sequence
from itertools import count
from typing import Final

LINGER_S: Final = 0.002
"""Seconds for which a first request waits for others, and a first answer."""

Pack = Callable[[object], bytes]
Request = tuple[int, str, bytes]
"""The number of a request, the name of a method, and its packed arguments."""
Answer = tuple[int, bool, bytes]
"""The number of a request, whether it raised, and its packed value or exception."""


class Exchange:
    """The controller's end.

    Args:
        send: Calls `Desk.exchange` of the actor; what it raises is raised to all who wait.
        pack: Makes bytes of arguments.
    """

    def __init__(self, send: Callable[[Sequence[Request]], Awaitable[Sequence[Answer]]], pack: Pack = pickle.dumps) -> None:
        self._send, self._pack = send, pack
        self._numbers = count()
        self._waiting: dict[int, asyncio.Future[object]] = {}
        self._queued: list[Request] = []
        self._on_way: set[asyncio.Task[None]] = set()

    def ask(self, method: str, *arguments: object) -> asyncio.Future[object]:
        """Call a method of the actor; the future has what it returns or raises."""
        packed, number, loop = self._pack(arguments), next(self._numbers), asyncio.get_running_loop()
        future = self._waiting[number] = loop.create_future()
        future.add_done_callback(lambda done: done.cancelled() or done.exception())  # seen, also where nobody waits
        if not self._queued:
            loop.call_later(LINGER_S, self._begin)
        self._queued.append((number, method, packed))
        return future

    def _begin(self) -> None:
        requests, self._queued = self._queued, []
        task = asyncio.create_task(self._carry(requests))
        self._on_way.add(task)

    async def _carry(self, requests: Sequence[Request]) -> None:
        """Exchange until others are on their way, or nobody waits for an answer."""
        task = asyncio.current_task()
        assert task is not None
        try:
            while True:
                for answer in await self._send(requests):
                    self._resolve(*answer)
                queued = {number for number, _, _ in self._queued}
                if len(self._on_way) > 1 or self._waiting.keys() <= queued:
                    return
                requests = ()
        except Exception as error:  # supervision: whoever waits hears why nothing comes any more
            waiting, self._waiting = self._waiting, {}
            for future in waiting.values():
                if not future.done():
                    future.set_exception(error)
        finally:
            self._on_way.discard(task)

    def _resolve(self, number: int, has_raised: bool, packed: bytes) -> None:
        future = self._waiting.pop(number, None)
        if future is None or future.done():
            return
        try:
            value = pickle.loads(packed)
        except Exception as error:  # supervision: an object of the user's that cannot be made again concerns who asked for it
            has_raised, value = True, RuntimeError(f"what it answered cannot be read here: {type(error).__name__}: {error}")
        if has_raised:
            future.set_exception(value)
        else:
            future.set_result(value)


class Desk:
    """The actor's end; it is made where its event loop runs.

    Args:
        methods: What may be asked, by name.
        pack: Makes bytes of what it returned or raised.
    """

    def __init__(self, methods: Mapping[str, Callable[..., Awaitable[object]]], pack: Pack = pickle.dumps) -> None:
        self._methods, self._pack = methods, pack
        self._running: set[asyncio.Task[None]] = set()
        self._answers: list[Answer] = []
        self._changed = asyncio.Condition()

    async def exchange(self, requests: Sequence[Request]) -> list[Answer]:
        """Begin requests, and return the answers that are there; none where no request runs any more."""
        self._running |= {asyncio.create_task(self._answer(*request)) for request in requests}
        async with self._changed:
            await self._changed.wait_for(lambda: self._answers or not self._running)
            if self._running and self._answers:
                self._changed.release()  # others come and go meanwhile
                try:
                    await asyncio.sleep(LINGER_S)
                finally:
                    await self._changed.acquire()
            answers, self._answers = self._answers, []
        return answers

    async def _answer(self, number: int, method: str, packed: bytes) -> None:
        has_raised = False
        try:
            answer = self._pack(await self._methods[method](*pickle.loads(packed)))
        except Exception as error:  # supervision: it is the answer
            has_raised, answer = True, self._packed_error(error)
        task = asyncio.current_task()
        assert task is not None
        async with self._changed:
            self._answers.append((number, has_raised, answer))
            self._running.discard(task)
            self._changed.notify_all() if not self._running else self._changed.notify()

    def _packed_error(self, error: Exception) -> bytes:
        try:
            return self._pack(error)
        except Exception:
            return self._pack(RuntimeError(f"{type(error).__name__}: {error}"))
