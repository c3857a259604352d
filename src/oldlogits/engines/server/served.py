"""The engine behind the routes of `oldlogits serve`: labels of versions, pauses, and weight updates in their order."""

from __future__ import annotations

import asyncio
import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path

from oldlogits.core.engine import EngineSpec, Generation, PauseMode
from oldlogits.core.errors import ConfigError
from oldlogits.core.server import GenerateRequest, SharedWeights
from oldlogits.engines.embedded.process import EngineProcess
from oldlogits.engines.protocols.vllm_messages import ABORT_PREFIX, STARTING_LABEL, NonceFile
from oldlogits.engines.shared_memory import is_shared, says


class Served:
    """The engine behind the routes, and the labels of its versions."""

    def __init__(self, engine: EngineProcess, spec: EngineSpec, name: str) -> None:
        self.engine, self.spec, self.name = engine, spec, name
        self.labels = {0: STARTING_LABEL}  # by the engine's own version, which counts updates
        self._running: dict[str, list[str]] = {}  # the engine's ids of requests, by the ids that they are aborted under
        self.numbers = itertools.count()
        self.is_paused = self._updating = False
        self._loads = False  # whether the update that goes on has loaded weights
        self._order = asyncio.Lock()  # pauses and updates, one at a time

    @property
    def num_running(self) -> int:
        """How many requests were not answered yet."""
        return sum(map(len, self._running.values()))

    async def generate(self, request: GenerateRequest) -> Generation:
        """Sample a completion."""
        known_as = ABORT_PREFIX + request.request_id
        own_id = f"{request.request_id}.{next(self.numbers)}"  # the engine wants unique ones, of the same trajectory
        self._running.setdefault(known_as, []).append(own_id)
        try:
            return await self.engine.generate(request.token_ids, request.sampling, own_id)
        finally:
            self._running[known_as].remove(own_id)
            if not self._running[known_as]:
                del self._running[known_as]

    async def abort(self, names: Sequence[str]) -> int:
        """End requests by the names that they are aborted under; returns how many. No name: all."""
        own_ids = [own_id for name in names or list(self._running) for own_id in self._running.get(name, [])]
        for own_id in own_ids:
            await self.engine.abort(own_id)
        return len(own_ids)

    async def pause(self, mode: PauseMode, clear_cache: bool) -> None:
        """Stop sampling. A cleared cache is computed anew with the next weights."""
        async with self._order:
            await self.engine.pause(mode, "recompute" if clear_cache else "stale")
            self.is_paused = True

    async def resume(self) -> None:
        """Go on sampling."""
        async with self._order:
            if self._updating:
                raise _wrong("resume within a weight update", "finish_weight_update first", "finish the update")
            await self.engine.resume()
            self.is_paused = False

    def check_transfer(self, info: NonceFile) -> None:
        """Refuse a trainer whose files cannot be read here: it sends a file, and what it says."""
        if not says(Path(info.path), info.nonce):
            raise _wrong(f"path = {info.path}", "a file of this machine that says the nonce", "serve on the trainer's machine")

    async def start_update(self) -> None:
        """Begin a weight update."""
        async with self._order:
            if not self.is_paused or self._updating:
                raise _wrong("no pause" if not self.is_paused else "a second start", "pause, then one start", "pause first")
            self._updating, self._loads = True, False

    async def load(self, shared: SharedWeights) -> None:
        """Take over the weights of a `HostCopy`; what is refused changes neither weights nor label."""
        path = shared.path
        async with self._order:
            self._require_update()
            if not is_shared(path) or not path.is_file():
                raise _wrong(f"path = {path}", f"a file oldlogits-*.weights in /dev/shm or {tempfile.gettempdir()}", "share it")
            self._loads = False
            version = max(self.labels) + 1
            await self.engine.load(path, shared.version, version)
            self.labels[version], self._loads = self.label, True

    async def finish_update(self, label: str | None) -> None:
        """End a weight update, and give the weights their label.

        Raises:
            ConfigError: No update was started; or there is a label, and no weights that it could be of, because what was to be
                loaded was refused: then the update has ended, and weights and label are what they were.
        """
        async with self._order:
            self._require_update()
            self._updating = False
            if label is not None and not self._loads:
                raise _wrong("a label for weights that were not loaded", f"the label {self.label!r}", "load them first")
            if label is not None:
                self.labels[max(self.labels)] = label

    def _require_update(self) -> None:
        if not self._updating:
            raise _wrong("no update was started", "start_weight_update first", "start the update")

    @property
    def label(self) -> str:
        """The label of the weights."""
        return self.labels[max(self.labels)]


def _wrong(got: str, allowed: str, fix: str) -> ConfigError:
    return ConfigError("the engine cannot do this now", got=got, allowed=allowed, fix=fix)
