"""What the actors of a cluster do, as plain classes: `backends/ray/backend.py` makes actors of them.

Calls             the trainer, or the dedicated scorer: carries out calls, one at a time
Worker            a server that samples, and a share of the environments
NodeWeightCache   once a node: the newest weights in its shared memory, from which its servers load; one of them, beside the
controller, is the store from which those that are behind or join are supplied
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from oldlogits.backends.packed import Aside, Packed, pack, set_aside, unpack
from oldlogits.backends.ray.exchange import Answer, Desk, Pack, Request
from oldlogits.backends.ray.remote_environments import call_here
from oldlogits.config.episodes import EnvConfig
from oldlogits.core.environment import Environment
from oldlogits.core.errors import OldLogitsError
from oldlogits.core.server import LaunchSpec
from oldlogits.core.weights import FullWeights, PolicyVersion
from oldlogits.engines.http.launch import ServerProcess
from oldlogits.engines.shared_memory import HostWeights, share_text, unshare
from oldlogits.envs.base import load_environment
from oldlogits.rollout.environment_runner import ThreadRunner
from oldlogits.rpc.child import BEAT_S, READY
from oldlogits.rpc.client import CarryOut
from oldlogits.rpc.processes import keep_what_is_built, name_process


class Calls:
    """Carries out the calls of a Protocol in an actor."""

    def __init__(self, name: str, build: Callable[..., CarryOut], arguments: tuple[object, ...]) -> None:
        name_process(name)
        self._failure: OldLogitsError | None = None
        try:
            self._carry_out = build(*arguments)
        except OldLogitsError as error:
            self._failure = error

    def call(self, method: str, arguments: tuple[object, ...], weights: Packed | None = None) -> tuple[object, Packed | None]:
        """Carry out a call, with `Aside.WEIGHTS` in place of weights; returns its value and the weights that belong there."""
        if self._failure is not None:
            raise self._failure
        if method == READY:
            keep_what_is_built()
            return None, None
        given = tuple(unpack(weights) if weights and argument is Aside.WEIGHTS else argument for argument in arguments)
        value, update = set_aside(self._carry_out(method, given))
        return value, None if update is None else pack(update)

    def beat(self) -> None:
        """Return in `BEAT_S` seconds: who asks for it learns whether this process lives."""
        threading.Event().wait(BEAT_S)


class Worker:
    """A server that samples, and environments.

    `node` tells in the actor its node's id, and the address for servers there; `pack` makes bytes of answers.
    """

    def __init__(self, spec: LaunchSpec, name: str, env: EnvConfig, node: Callable[[], tuple[str, str]], pack: Pack) -> None:
        name_process("worker")
        self._node_id, address = node()
        self._server = ServerProcess(replace(spec, address=address), name)
        self._class = load_environment(*env.words, env.reward, env.mixture)
        self._runner = ThreadRunner(timeout_s=env.timeout_s, latency_s=0.0, seed=0)
        self._tool_errors = env.tool_errors
        self._environments: dict[int, asyncio.Future[Environment]] = {}
        self._desk = Desk({"open": self.open, "call": self.call}, pack)

    async def where(self) -> tuple[str, str, str]:
        """The URL and the token of its server, and the id of its node."""
        return self._server.url, self._server.token, self._node_id

    async def exit_code(self) -> int | None:
        """The exit code of its server; None while that lives."""
        return self._server.exit_code

    async def restart(self) -> None:
        """Start the server again; the environments live on."""
        await asyncio.to_thread(self._server.restart)

    async def exchange(self, requests: Sequence[Request]) -> list[Answer]:
        """Begin requests for `open` and `call`, and return the answers that are there."""
        return await self._desk.exchange(requests)

    async def open(self, id: int) -> None:
        """Make an environment, for which calls wait."""
        self._environments[id] = opening = asyncio.ensure_future(self._runner(self._class))
        await opening

    async def call(self, id: int, method: str, args: Sequence[object], kwargs: Mapping[str, object]) -> object:
        """Call a method of an environment."""
        environment = await self._environments[id]
        return await self._runner(lambda: call_here(environment, method, args, kwargs, self._tool_errors))

    async def drop(self, ids: Sequence[int]) -> None:
        """Forget environments."""
        for id in ids:
            self._environments.pop(id, None)

    async def close(self) -> None:
        """End the server."""
        self._server.close()

    async def beat(self) -> None:
        """Return in `BEAT_S` seconds: who asks for it learns whether this process lives."""
        await asyncio.sleep(BEAT_S)


class NodeWeightCache:
    """The newest weights of a node."""

    def __init__(self) -> None:
        name_process("weights")
        self._weights = HostWeights()

    def take(self, packed: Packed, version: PolicyVersion) -> Path:
        """Bring the node's copy to a version; returns its file."""
        return self._weights.take(unpack(packed), version)

    def full(self) -> Packed:
        """All weights of the version that it holds."""
        with self._weights.read() as weights:
            return pack(FullWeights(tensors={name: tensor.clone() for name, tensor in weights.items()}))

    def share(self, text: str) -> Path:
        """Write a text where weights would be."""
        return share_text(text)

    def close(self) -> None:
        """Leave no file."""
        self._weights.close()
        unshare(os.getpid())
