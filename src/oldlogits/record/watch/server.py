"""A small web server for run folders on this machine: it reads, and answers nobody but a browser on this machine.

GET /                the runs in the folder
GET /run/NAME        the report of one, made anew when its events have grown
GET /episodes/NAME   its newest episodes
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

from oldlogits.core.errors import ConfigError, OldLogitsError
from oldlogits.record.folder import RunFolder
from oldlogits.record.owner import is_owned
from oldlogits.record.report.page import report_page
from oldlogits.record.watch.pages import episodes_page, list_page, run_folders

HOST: Final = "127.0.0.1"
"""Where it listens: other machines do not reach it."""
_NAMES: Final = {"127.0.0.1", "localhost"}
_PAGES: Final[dict[str, Callable[[Path], str]]] = {"run": report_page, "episodes": episodes_page}


class WatchServer(ThreadingHTTPServer):
    """Serves the run folders in one folder, read-only.

    Args:
        parent: The folder that holds them.
        port: The port; 0: any that is free.

    Raises:
        ConfigError: The port is taken, or may not be opened.
    """

    daemon_threads = True

    def __init__(self, parent: Path, port: int) -> None:
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            got, allowed = f"{port}: {error.strerror}", "a free port, or 0 for any"
            raise ConfigError("the port cannot be opened", got=got, allowed=allowed, fix="--port 0") from error
        self.parent = parent
        self._pages: dict[tuple[str, str], tuple[object, str]] = {}
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        """The address for a browser."""
        return f"http://{HOST}:{self.server_address[1]}/"

    def page(self, kind: str, name: str) -> str | None:
        """Return a page of a run, or None where there is no such run; one is made at a time, and kept until the run grows."""
        path = run_folders(self.parent).get(name)
        if path is None or kind not in _PAGES:
            return None
        with self._lock:
            state = _state(path)
            kept = self._pages.get((kind, name))
            if kept is None or kept[0] != state:
                kept = self._pages[kind, name] = state, _PAGES[kind](path)
            return kept[1]


def _state(path: Path) -> object:
    """What changes when there is something new to show."""
    folder = RunFolder(path=path)
    files = [file.stat() for file in (folder.events, folder.episodes) if file.exists()]
    return is_owned(path), [(found.st_size, found.st_mtime_ns) for found in files]


class _Handler(BaseHTTPRequestHandler):
    server: WatchServer
    timeout = 30

    def do_GET(self) -> None:
        """Answer with a page."""
        host = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
        if host not in _NAMES:  # a page of another site that a browser was led to by name
            self._say(HTTPStatus.FORBIDDEN, "This server answers to 127.0.0.1 and localhost.")
            return
        parts = [unquote(part) for part in urlsplit(self.path).path.split("/") if part]
        try:
            page = list_page(self.server.parent) if not parts else self.server.page(*parts) if len(parts) == 2 else None
        except (OldLogitsError, OSError) as error:
            self._say(HTTPStatus.INTERNAL_SERVER_ERROR, f"This run cannot be read: {error}")
            return
        if page is None:
            self._say(HTTPStatus.NOT_FOUND, "There is no such page.")
        else:
            self._send(HTTPStatus.OK, page, "text/html")

    def _say(self, status: HTTPStatus, text: str) -> None:
        self._send(status, text + "\n", "text/plain")

    def _send(self, status: HTTPStatus, text: str, kind: str) -> None:
        body = text.encode("utf-8", "replace")
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Keep the terminal quiet."""
