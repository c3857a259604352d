"""Starts a server of its own for a run, on this machine; its protocol says by which command line."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

import oldlogits
from oldlogits.core.errors import writing
from oldlogits.core.server import SERVER_PROTOCOLS, LaunchSpec, ServerFailedError, ServerProtocol
from oldlogits.engines.http import reaper

_LAST_WORDS: Final = 2000
"""Characters of a server's messages that an error quotes."""


class ServerProcess:
    """A server's process; a `Launched`."""

    def __init__(self, spec: LaunchSpec, name: str) -> None:
        self._spec, self._protocol = spec, SERVER_PROTOCOLS.find(spec.servers.protocol)
        self.log = spec.servers.log_folder / f"{name}.log"
        self.port, self.token = _free_port(spec.address), secrets.token_hex(16)
        self.url, self.where = f"http://{spec.address}:{self.port}", str(self.log)
        self._process = self._start()

    @property
    def exit_code(self) -> int | None:
        """None while it lives."""
        return self._process.poll()

    async def ready(self, server: ServerProtocol, start_s: float) -> None:
        """Wait until it answers."""
        ends = time.monotonic() + start_s
        while True:
            if self.exit_code is not None:
                raise ServerFailedError(
                    f"it ended with exit code {self.exit_code}; the end of {self.log}: {self._last_words()}"
                )
            try:
                await server.check_health(2.0)
                return
            except ServerFailedError as failure:
                if time.monotonic() > ends:
                    raise ServerFailedError(f"it is not ready after {start_s:g} s; see {self.log}") from failure
            await asyncio.sleep(0.2)

    def restart(self) -> None:
        """End what is left of it and start it again."""
        self.close()
        self._process = self._start()

    def close(self) -> None:
        """End it and whatever it has started."""
        reaper.end_group(self._process.pid)  # its weights are copies: nothing is lost
        self._process.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        with writing(self.log):
            self.log.parent.mkdir(parents=True, exist_ok=True)
            log = self.log.open("ab")
        with log:
            return subprocess.Popen(
                [sys.executable, reaper.__file__, str(os.getpid()), *self._protocol.command(self._spec, self.port)],
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is the controller's to handle; and it ends with all of its children
            )

    def _environment(self) -> dict[str, str]:
        """Variables of its process: this package importable, no downloads, and its protocol's own."""
        own = {"PYTHONPATH": os.pathsep.join(self._search_path()), "HF_HUB_OFFLINE": "1"}
        return {"OMP_NUM_THREADS": "1", **os.environ, **own, **self._protocol.environment(self.token)}

    def _search_path(self) -> list[str]:
        """Where its interpreter looks: if it is another one, first in a folder that holds this package and nothing else."""
        inherited = list(filter(None, [os.environ.get("PYTHONPATH")]))
        if not self._spec.servers.python:
            return inherited
        folder = self._spec.servers.log_folder / "python"
        folder.mkdir(parents=True, exist_ok=True)
        link = folder / "oldlogits"
        if not link.is_symlink():
            link.symlink_to(Path(oldlogits.__file__).parent, target_is_directory=True)
        return [str(folder.resolve()), *inherited]

    def _last_words(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")[-_LAST_WORDS:].strip()


def _free_port(address: str) -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        port: int = probe.getsockname()[1]
        return port
