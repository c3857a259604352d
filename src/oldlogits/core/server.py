"""Servers that sample over HTTP: the seam through which a kind of server is added.

    recipe: engine.server = "vllm" | "embedded" | "package.module:Name"
         -> SERVER_PROTOCOLS.find(name) -> a class: its attributes and `command` say how such a server is started
         -> class(http) -> ServerProtocol: speaks to one server through a transport that knows addresses, tokens and time-outs

Every call to a server either returns, or says in one of two ways that it did not: `ServerFailedError` (the server is gone,
hangs or broke: another one, or the same one later, may do it) and errors of this package (what was asked is wrong everywhere).
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final, Literal, Protocol, TypeAlias

from oldlogits.core.engine import EngineSpec, Generation, PauseMode, Sampling, ServerOptions
from oldlogits.core.errors import ConfigError
from oldlogits.core.registry import Registry
from oldlogits.core.weights import PolicyVersion

Json: TypeAlias = "Mapping[str, Json] | Sequence[Json] | str | int | float | bool | None"
"""A JSON value."""
LOOPBACK: Final = frozenset({"127.0.0.1", "localhost", "::1"})
"""Hosts of this machine, which need no token and no proxy."""
_REFUSALS: Final = (400, 401, 403, 404, 413, 422)
"""Answers that say that the request is wrong, not that the server is broken."""


class ServerFailedError(Exception):
    """A server did not answer (`timed_out`: it may only be slow), or answered that it is broken."""

    def __init__(self, how: str, *, timed_out: bool = False) -> None:
        self.timed_out = timed_out
        super().__init__(how)


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchSpec:
    """What a server is started with, and the address that it listens on; its command line is `ServerProtocol.command`."""

    engine: EngineSpec
    servers: ServerOptions
    address: str = "127.0.0.1"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerInfo:
    """What a server says of itself: the version of its software, and what it computes.

    Args:
        max_context: The most tokens of one sequence.
        arithmetic: What it computes in: "fp32" or "bf16".
        numerics: How it rounds weights; equal to the arithmetic unless it emulates another.
        adapter_scale: The scale of `EngineSpec`: 0 where it takes whole weights.
        returns_routing: Whether its answers say which experts served each token.
    """

    version: str
    max_context: int
    arithmetic: str
    numerics: str
    adapter_scale: float
    returns_routing: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedWeights:
    """Weights that a server is to take over: the file of a `HostCopy` on its machine, and the version that the file holds."""

    path: Path
    version: PolicyVersion


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """A request to sample a completion of tokens."""

    request_id: str
    token_ids: tuple[int, ...]
    sampling: Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What a server answered, whole."""

    path: str
    status: int
    content: bytes

    @property
    def text(self) -> str:
        """The answer as text."""
        return self.content.decode(errors="replace")


class Transport(Protocol):
    """Carries calls to one server: address, token, proxy, time-outs, and whose files the server can read.

    Args:
        url: The server's base address.
        control_timeout_s: How long a control call may take.
    """

    url: str
    control_timeout_s: float

    async def call(self, method: str, path: str, body: Json | bytes = None, *, timeout_s: float | None) -> Reply:
        """Call a route; a cancellation closes the connection, which ends the request there too.

        Args:
            method: "GET" or "POST".
            path: The route, with its query.
            body: Sent as JSON, unless it is None; bytes are JSON already.
            timeout_s: How long the answer may take; None: as long as it takes.

        Raises:
            ServerFailedError: There is no answer.
        """

    async def control(self, method: str, path: str, body: Json = None) -> Reply:
        """Call a route within the time of control calls; only an answer of status 200 is returned.

        Raises:
            ServerFailedError: There is no answer, or the server is broken.
            ConfigError: The server refuses the request.
        """
        return self.accepted(await self.call(method, path, body, timeout_s=self.control_timeout_s))

    def accepted(self, reply: Reply) -> Reply:
        """Return an answer of status 200; raise what `control` raises for another one."""
        got = f"{reply.path} answers {reply.status}: {reply.text[:300]}"
        if reply.status in _REFUSALS:
            raise self.refused(got, "a request that it serves", "correct what it names")
        if reply.status != 200:
            raise ServerFailedError(got)
        return reply

    def refused(self, got: str, allowed: str, fix: str) -> ConfigError:
        """Make the error that says why this server cannot be used."""
        return ConfigError(f"the server {self.url} cannot be used", got=got, allowed=allowed, fix=fix)

    async def share(self, text: str) -> Path:
        """Write a text to a file where the weights for this server will be."""

    async def located(self, weights: SharedWeights) -> SharedWeights:
        """Return the weights with the path that they have on the server's own machine: the same one, if it is this."""
        return weights

    def move_to(self, url: str, token: str) -> None:
        """Speak to another address from now on: the server was started elsewhere."""

    async def close(self) -> None:
        """Leave no connection; what waits for an answer fails."""


class ServerProtocol(Protocol):
    """How servers of one kind are started and spoken to; an instance speaks to one server.

    A server knows versions by labels: texts that its client chooses. A server with a label that `label_of` did not make was
    started again, or is updated by another trainer.

    One's own inherits from this class; `engine.server = "package.module:Name"` names it. Its module is imported when a
    recipe is read, so it imports heavy packages inside its methods only. Every call raises `ServerFailedError` or `ConfigError`
    as the head of this module says.
    """

    numerics: ClassVar[frozenset[str]] = frozenset({"fp32", "bf16"})
    """The values of engine.precision that `command` can start a server with."""
    uses_gpu: ClassVar[bool] = True
    """Whether a server that the run starts takes the machine's GPU, where there is one."""
    needs: ClassVar[str] = ""
    """The module that the server's interpreter must have; empty: none."""
    http: Transport
    """Carries the calls of this server."""
    _run: str

    def __init__(self, http: Transport) -> None:
        self.http, self._run = http, secrets.token_hex(4)

    def label_of(self, version: PolicyVersion) -> str:
        """Return what the server is to call a version: a text that no other client uses."""
        return f"{self._run}/{version}"

    def version_of(self, label: str) -> PolicyVersion:
        """Return the version that `label_of` made the label of; -1: it made no such label."""
        run, _, version = label.partition("/")
        return int(version) if run == self._run else -1

    @property
    def url(self) -> str:
        """The server's base address."""
        return self.http.url

    async def close(self) -> None:
        """Leave no connection."""
        await self.http.close()

    @classmethod
    def check(cls, spec: EngineSpec) -> None:
        """Refuse a model folder that such servers cannot run; by default it is left to the server to do so.

        Raises:
            ModelFolderError: The model is of a family that they do not implement.
        """
        return

    @classmethod
    def command(cls, spec: LaunchSpec, port: int) -> list[str]:
        """The command line that starts a server."""
        raise NotImplementedError

    @classmethod
    def environment(cls, token: str) -> Mapping[str, str]:
        """Environment variables of the server's process; `token` is what it is to ask for."""
        return {}

    @classmethod
    def flag(cls, setting: Literal["adapter_scale", "max_context"], value: str) -> str:
        """How a server is started with another value of a setting: what an error advises."""
        return f"{setting} = {value}"

    async def connect(self) -> ServerInfo:
        """Ask what the server can do, and refuse one that cannot do what training needs."""

    async def generate(self, request: GenerateRequest) -> Generation:
        """Sample a completion; takes as long as it takes. Spans of weights with somebody else's label have version -1."""

    async def abort(self, request_ids: Sequence[str]) -> None:
        """End requests; their `generate` returns what was sampled so far."""

    async def pause(self, mode: PauseMode) -> None:
        """Stop sampling; keys and values are computed anew afterwards."""

    async def resume(self) -> None:
        """Go on sampling."""

    async def update(self, weights: SharedWeights) -> None:
        """Take over weights, while the server is paused, and give them the label of their version."""

    async def version(self) -> PolicyVersion:
        """Return the version of the server's weights; -1: their label is somebody else's."""

    async def check_health(self, timeout_s: float) -> None:
        """Return if the server answers that it is well."""

    async def num_sampled(self, timeout_s: float) -> int | None:
        """Tokens that the server has sampled since it started; None: it does not say."""


SERVER_PROTOCOLS: Final = Registry[type[ServerProtocol]](
    "server protocol",
    key="engine.server",
    builtin={
        "vllm": "oldlogits.engines.protocols.vllm:VllmProtocol",
        "embedded": "oldlogits.engines.protocols.embedded:EmbeddedProtocol",
    },
    needs=("command", "connect", "generate", "update"),
)
