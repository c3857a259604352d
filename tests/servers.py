"""Servers as processes of their own, for tests that kill, stop and start them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from .waiting import HUNG_S


class Serving:
    """`oldlogits serve` in a process group of its own; where it listens stays the same when it is started again."""

    def __init__(self, folder: Path, *options: str, token: str = "") -> None:
        self.folder, self.options, self.token = folder, options, token
        self.port = 0
        self.start()

    def start(self) -> None:
        words = [sys.executable, "-m", "oldlogits", "serve", str(self.folder), "--port", str(self.port), *self.options]
        environment = {**os.environ, "OLDLOGITS_TOKEN": self.token}
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True)
        line = next((line for line in self.process.stdout if line.startswith("serving")), "")  # what is noted stands before it
        assert line, "the server ended"
        self.url = line.split(" on ")[1].split()[0]
        self.port = int(self.url.rpartition(":")[2])

    def signal(self, number: int) -> None:
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        """As if its machine had lost power: with its engine, at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process.stdout.close()

    def get(self, path: str) -> dict:
        return self._call("GET", path)

    def post(self, path: str) -> dict:
        return self._call("POST", path)

    def _call(self, method: str, path: str) -> dict:
        headers = {"authorization": f"Bearer {self.token}"} if self.token else {}
        answer = httpx.request(method, self.url + path, headers=headers, timeout=HUNG_S, trust_env=False)
        return answer.raise_for_status().json()


@contextmanager
def serving(folder: Path, *options: str, token: str = "") -> Iterator[Serving]:
    server = Serving(folder, *options, token=token)
    try:
        yield server
    finally:
        server.kill()
