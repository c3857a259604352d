"""What the processes of tests/backends/test_rpc.py carry out; it imports nothing heavy, since each of them imports it."""

import gc
import time
from typing import Protocol

from oldlogits.core.errors import ConfigError
from oldlogits.rpc.client import Dispatcher


class Notes(Protocol):
    """A notebook in another process."""

    @property
    def owner(self) -> str: ...

    async def add(self, word: str, times: int = 1) -> int: ...

    async def read(self) -> list[str]: ...

    async def fail(self, kind: str) -> None: ...

    async def rest(self, seconds: float) -> None: ...

    async def echo(self, value: object) -> object: ...

    async def num_left_alone(self) -> int: ...


class Notebook:
    """Keeps words; what it cannot do it says."""

    def __init__(self, first):
        if not first:
            raise ConfigError("an empty word", got="''", allowed="a word", fix="write one")
        self.words = [first]

    def add(self, word, times=1):
        self.words += [word] * times
        return len(self.words)

    def read(self):
        return self.words

    def fail(self, kind):
        raise {"own": ConfigError("no such word", got="x", allowed="y", fix="z"), "defect": ZeroDivisionError("by zero")}[kind]

    def rest(self, seconds):
        time.sleep(seconds)

    def echo(self, value):
        return value

    def num_left_alone(self):
        return gc.get_freeze_count()

    def erase(self):
        self.words = []


def build(first):
    return Dispatcher(Notes, Notebook(first)).call


def chatter(inbox):
    """Serve by sending rubbish."""
    inbox._pipe.send_bytes(b"rubbish")
    inbox.receive()
