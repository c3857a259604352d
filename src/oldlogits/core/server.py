"""Servers that sample over HTTP: the seam through which a kind of server is added.

    recipe: engine.server = "vllm" | "embedded" | "package.module:Name"
         -> SERVER_PROTOCOLS.find(name) -> a class: its attributes and `command` say how such a server is started
         -> class(http) -> ServerProtocol: speaks to one server through a transport that knows addresses, tokens and time-outs

Every call to a server either returns, or says in one of two ways that it did not: `ServerFailedError` (the server is gone,
hangs or broke: another one, or the same one later, may do it) and errors of this package (what was asked is wrong everywhere).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final, Literal, Protocol, TypeAlias

from oldlogits.core.engine import EngineSpec, FinishReason, Sampling, ServerOptions
from oldlogits.core.errors import ConfigError
from oldlogits.core.registry import Registry
from oldlogits.core.weights import PolicyVersion

Json: TypeAlias = "Mapping[str, Json] | Sequence[Json] | str | int | float | bool | None"
"""A JSON value."""


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
    """

    version: str
    max_context: int
    arithmetic: str
    numerics: str
    adapter_scale: float


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
class LabelledSpan:
    """Output tokens ``[start, end)`` were sampled with the weights of one label."""

    label: str
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateAnswer:
    """What a server has sampled for a request; as `Generation`, but with labels in place of versions.

    A server knows versions by labels: any text, chosen by the client.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    spans: tuple[LabelledSpan, ...]
    finish_reason: FinishReason
    prompt_logprobs: tuple[float, ...] = ()


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
    """Carries calls to one server: address, token, proxy, time-outs, and whose files the server can read."""

    @property
    def url(self) -> str:
        """The server's base address."""

    @property
    def control_timeout_s(self) -> float:
        """How long a control call may take."""

    async def call(self, method: str, path: str, body: Json = None, *, timeout_s: float | None) -> Reply:
        """Call a route, with its query; a cancellation closes the connection.

        Args:
            method: "GET" or "POST".
            path: The route, with its query.
            body: Sent as JSON, unless it is None.
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

    def accepted(self, reply: Reply) -> Reply:
        """Return an answer of status 200; raise what `control` raises for another one."""

    def refused(self, got: str, allowed: str, fix: str) -> ConfigError:
        """Make the error that says why this server cannot be used."""

    async def share(self, text: str) -> Path:
        """Write a text to a file where the weights for this server will be."""

    async def located(self, weights: SharedWeights) -> SharedWeights:
        """Return the weights with the path that they have on the server's own machine."""

    def move_to(self, url: str, token: str) -> None:
        """Speak to another address from now on: the server was started elsewhere."""

    async def close(self) -> None:
        """Leave no connection; what waits for an answer fails."""


class ServerProtocol(Protocol):
    """How servers of one kind are started and spoken to; an instance speaks to one server.

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

    def __init__(self, http: Transport) -> None:
        self.http = http

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

    async def generate(self, request: GenerateRequest) -> GenerateAnswer:
        """Sample a completion; takes as long as it takes."""

    async def abort(self, request_ids: Sequence[str]) -> None:
        """End requests; their `generate` returns what was sampled so far."""

    async def pause(self, mode: Literal["keep", "abort"]) -> None:
        """Stop sampling; keys and values are computed anew afterwards."""

    async def resume(self) -> None:
        """Go on sampling."""

    async def update(self, weights: SharedWeights, label: str) -> None:
        """Take over weights, while the server is paused, and call them `label` from then on."""

    async def label(self) -> str:
        """What the server's weights are called."""

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
