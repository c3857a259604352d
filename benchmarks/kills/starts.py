"""Starts of the command line in processes that have imported its packages before: most of a short run's time is imports.

    this process -> fork server, which has imported what `oldlogits train` imports -> a fork of it for every start

A start is a process of its own session, with its own output and environment. What it starts itself is spawned as always.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

PRELOADED = ["oldlogits.__main__", "oldlogits.cli.train", "oldlogits.run.run", "order_desk.environment"]

_asking = threading.Lock()
"""Threads start and poll one at a time: the end of a process is told once, to whoever asks first."""


class Start:
    """A command that runs, with the surface of `subprocess.Popen` that is used here.

    Args:
        words: The command line, from the verb on.
        said: The file of its output.
        environment: What it has beside the variables of this process.
    """

    def __init__(self, words: Sequence[str], said: Path, environment: Mapping[str, str]) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        arguments = (list(words), str(said), os.environ | environment)
        self._process = context.Process(target=_be, args=arguments)
        with _asking:
            self._process.start()
        assert self._process.pid is not None, "it was started"
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        """The exit status, or minus the signal that ended it; None: it runs."""
        with _asking:
            return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once, and wait until it has ended."""
        with _asking:
            if self._process.exitcode is None:
                self._process.kill()
            self._process.join()


def _be(words: list[str], said: str, environment: dict[str, str]) -> None:
    """Be the command."""
    os.setsid()
    output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(output, number)
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    command = importlib.import_module("oldlogits.__main__")
    sys.modules["__main__"] = command  # what it spawns imports this, and not the trials
    command.main(words)
