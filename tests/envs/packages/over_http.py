"""MCP servers over HTTP as processes of their own."""

import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

from ...waiting import wait_until


def free_port():
    """A port of this machine that nobody listens to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def serving(name, port):
    """Start a server of this folder, give its address, and kill it."""
    command = [sys.executable, str(Path(__file__).with_name(name)), str(port)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:

        def answers():
            assert process.poll() is None, f"{name} ended"
            with socket.socket() as trial:
                return trial.connect_ex(("127.0.0.1", port)) == 0

        try:
            wait_until(answers, "the server answers")
            yield f"http://127.0.0.1:{port}/mcp"
        finally:
            process.kill()
