"""One server that speaks vLLM's HTTP routes: what it can do, and what it is told.

Every call either returns, or says in one of two ways that it did not: `ServerFailedError` (the server is gone, hangs or broke:
another one, or the same one later, may do it) and the errors of this package (what was asked is wrong everywhere).
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp

from oldlogits.core.engine import Sampling
from oldlogits.core.errors import ConfigError
from oldlogits.engines.http import messages as wire
from oldlogits.engines.http.messages import LOOPBACK, Json, typed
from oldlogits.engines.shared_memory import share_text

OLDEST: Final = (0, 32)
"""The first release of vLLM that says which weights sampled a token."""

_ARITHMETIC: Final[Mapping[str, str]] = {"float32": "fp32", "bfloat16": "bf16"}


class ServerFailedError(Exception):
    """A server did not answer, or answered that it is broken.

    Args:
        how: What happened.
        timed_out: It may only be slow.
    """

    def __init__(self, how: str, *, timed_out: bool = False) -> None:
        self.timed_out = timed_out
        super().__init__(how)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerInfo:
    """What a server says of itself.

    Args:
        version: Of vLLM.
        max_context: The most tokens of one sequence.
        max_num_seqs: Sequences decoded at the same time.
        arithmetic: What it computes in: "fp32" or "bf16".
        numerics: How it rounds weights; that of its arithmetic unless it emulates another.
        adapter_scale: As in `EngineSpec`: 0 where it takes whole weights.
    """

    version: str
    max_context: int
    max_num_seqs: int
    arithmetic: str
    numerics: str
    adapter_scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    """What a server answered, whole."""

    path: str
    status: int
    content: bytes

    @property
    def text(self) -> str:
        return self.content.decode(errors="replace")


class Server:
    """One server.

    Args:
        url: Its base address.
        token: Bearer token, or empty.
        control_timeout_s: How long a control call may take: pause, weight update, resume, abort.
    """

    def __init__(self, url: str, *, token: str, control_timeout_s: float) -> None:
        self.url, self._control_timeout_s = url.rstrip("/"), control_timeout_s
        self._token = token
        parts = urlsplit(url)
        asks_proxy = parts.hostname not in LOOPBACK and not proxy_bypass(parts.hostname or "")  # it is for other machines
        self._proxy = getproxies().get(parts.scheme) if asks_proxy else None
        self._opened: aiohttp.ClientSession | None = None  # with the first call: a session belongs to a running loop
        self._is_closed = False

    def move_to(self, url: str, token: str) -> None:
        """It listens elsewhere from now on."""
        self.url, self._token = url.rstrip("/"), token

    async def close(self) -> None:
        """Leave no connection; what waits for an answer fails."""
        self._is_closed = True
        if self._opened is not None:
            await self._opened.close()

    @property
    def _session(self) -> aiohttp.ClientSession:
        if self._opened is None:
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2.0)  # servers close idle connections after 5 s
            self._opened = aiohttp.ClientSession(connector=connector)
        return self._opened

    async def connect(self) -> ServerInfo:
        """Ask what it can do, and refuse what cannot work.

        Raises:
            ServerFailedError: It does not answer.
            ConfigError: It cannot do what training needs; says how to start it so that it can.
        """
        version = typed((await self._object("GET", "/version", "be vLLM 0.32 or later")).get("version"), str, "version")
        numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
        if numbers < OLDEST:
            raise self._refused(f"vLLM {version}", "vLLM 0.32 or later, which tags tokens with weight versions", "upgrade vLLM")
        remedy = "start it with the environment variable VLLM_SERVER_DEV_MODE=1, which adds the routes of weight updates"
        info = await self._object("GET", "/server_info?config_format=json", remedy)
        await self._object("GET", "/weight_info", remedy)
        read = self._read(version, typed(info.get("vllm_config"), dict, "vllm_config"))
        await self._check_generation()
        await self._check_transfer()
        return read

    def _read(self, version: str, config: Mapping[str, object]) -> ServerInfo:
        model = typed(config.get("model_config"), dict, "model_config")
        transfer = config.get("weight_transfer_config")
        backend = transfer.get("backend") if isinstance(transfer, dict) else None
        if backend != wire.BACKEND:
            flags = transfer_flags()
            raise self._refused(
                f"weight transfer backend {backend!r}", f"{wire.BACKEND!r}", "start it with " + " ".join(map(_quoted, flags))
            )
        mode = model.get("logprobs_mode")
        if mode != "processed_logprobs":
            fix = "start it with --logprobs-mode processed_logprobs"
            raise self._refused(f"logprobs of mode {mode!r}", "those of the distribution that is sampled from", fix)
        dtype = str(model.get("dtype")).removeprefix("torch.")
        if dtype not in _ARITHMETIC:
            raise self._refused(f"dtype {dtype}", ", ".join(_ARITHMETIC), "start it with --dtype float32 or bfloat16")
        said = config.get("additional_config")
        own = said if isinstance(said, dict) else {}
        emulated, scale = own.get("oldlogits_numerics"), own.get("oldlogits_adapter_scale", 0)
        scheduler = typed(config.get("scheduler_config"), dict, "scheduler_config")
        return ServerInfo(
            version=version,
            max_context=typed(model.get("max_model_len"), int, "max_model_len"),
            max_num_seqs=typed(scheduler.get("max_num_seqs"), int, "max_num_seqs"),
            arithmetic=_ARITHMETIC[dtype],
            numerics=str(emulated) if emulated else _ARITHMETIC[dtype],
            adapter_scale=typed(float(scale) if isinstance(scale, int) else scale, float, "oldlogits_adapter_scale"),
        )

    async def _check_generation(self) -> None:
        """One token, to see that the route is there and answers in full; a paused server answers later."""
        if (await self._object("GET", "/is_paused", "be vLLM 0.32 or later")).get("is_paused"):
            await self._end_update()
            await self.resume()
        request = wire.Request(
            request_id=f"connect-{secrets.token_hex(4)}", token_ids=(0,), sampling=Sampling(max_tokens=1, temperature=1.0)
        )
        answer = await self._call("POST", "/inference/v1/generate", request.to_json(), self._control_timeout_s)
        if answer.status in (403, 404):
            raise self._refused("no /inference/v1/generate", "the token-in/token-out route", "start it with --enable-scale-out")
        wire.Answer.from_json(self._parsed(answer), request)

    async def _end_update(self) -> None:
        """End an update that a trainer left unfinished: weights of no version, until others are given."""
        with contextlib.suppress(ServerFailedError, ConfigError):  # none was begun
            await self._post("/finish_weight_update", {"weight_version": wire.UNFINISHED_LABEL})

    async def _check_transfer(self) -> None:
        """Whether it reads this machine's files."""
        nonce = secrets.token_hex(8)
        path = await self._share(nonce)
        try:
            await self._post("/init_weight_transfer_engine", {"init_info": {"path": str(path), "nonce": nonce}})
        except (ServerFailedError, ConfigError) as error:
            if isinstance(error.__cause__, (aiohttp.ClientError, OSError)):  # it did not answer at all
                raise
            fix = "run server and trainer on one machine, as one user"
            raise self._refused(f"{error}", "a server that reads the trainer's shared memory", fix) from error
        finally:
            path.unlink(missing_ok=True)

    async def _share(self, text: str) -> Path:
        """Write a text where the weights for this server will be."""
        return share_text(text)

    async def generate(self, request: wire.Request) -> wire.Answer:
        """Sample a completion; takes as long as it takes.

        Raises:
            ServerFailedError: The server is gone or broke.
            ConfigError: The request cannot be served.
        """
        answer = await self._call("POST", "/inference/v1/generate", request.to_json(), None)
        return wire.Answer.from_json(self._parsed(answer), request)

    async def abort(self, request_ids: list[str]) -> None:
        """End requests; their `generate` returns what was sampled so far."""
        await self._post("/inference/v1/abort_requests", {"request_ids": [wire.ABORT_PREFIX + id for id in request_ids]})

    async def pause(self, mode: str) -> None:
        """Stop sampling; keys and values are computed anew afterwards."""
        await self._post(f"/pause?mode={mode}&clear_cache=true", None)

    async def resume(self) -> None:
        """Go on sampling."""
        await self._post("/resume", None)

    async def update(self, update_info: Json, label: str) -> None:
        """Take over weights, while it is paused.

        Args:
            update_info: Where they are.
            label: What they are called.
        """
        await self._post("/start_weight_update", None)
        await self._post("/update_weights", {"update_info": update_info})
        await self._post("/finish_weight_update", {"weight_version": label})

    async def label(self) -> str:
        """What its weights are called."""
        body = typed(self._parsed(await self._call("GET", "/weight_info", None, self._control_timeout_s)), dict, "the body")
        return typed(body.get("weight_version"), str, "weight_version")

    async def check_health(self, timeout_s: float) -> None:
        """Whether it answers at all.

        Raises:
            ServerFailedError: It does not.
        """
        answer = await self._call("GET", "/health", None, timeout_s)
        if answer.status != 200:
            raise ServerFailedError(f"/health answers {answer.status}")

    async def num_sampled(self, timeout_s: float) -> int | None:
        """Tokens that it has sampled since it started; None: it does not say.

        Raises:
            ServerFailedError: It does not answer.
        """
        answer = await self._call("GET", "/metrics", None, timeout_s)
        counts = re.findall(rf"^{wire.SAMPLED}.* (\S+)$", answer.text, re.MULTILINE)
        return round(sum(map(float, counts))) if counts else None

    async def _object(self, method: str, path: str, remedy: str) -> Mapping[str, object]:
        answer = await self._call(method, path, None, self._control_timeout_s)
        if answer.status in (401, 403):
            fix = "name the environment variable that holds the token: engine.token_env"
            raise self._refused(f"{path} answers {answer.status}", "a token that the server accepts", fix)
        if answer.status == 404:
            raise self._refused(f"no {path}", "the routes of vLLM 0.32", remedy)
        return typed(self._parsed(answer), dict, path)

    async def _post(self, path: str, body: Json) -> None:
        self._parsed(await self._call("POST", path, body, self._control_timeout_s))

    async def _call(self, method: str, path: str, body: Json, timeout_s: float | None) -> _Answer:
        """The answer to a request; a cancellation closes the connection, which ends the request there too."""
        if self._is_closed:
            raise ServerFailedError(f"{method} {path}: it was given up")
        headers = {"content-type": "application/json"} if body is not None else {}
        if self._token:
            headers["authorization"] = f"Bearer {self._token}"
        data = None if body is None else json.dumps(body).encode()
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=10.0)
        try:
            asking = self._session.request(
                method, self.url + path, data=data, headers=headers, timeout=timeout, proxy=self._proxy
            )
            async with asking as answer:
                return _Answer(path=path.partition("?")[0], status=answer.status, content=await answer.read())
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            timed_out = isinstance(error, TimeoutError)
            how = f"no answer within {timeout_s:g} s" if timed_out and timeout_s else str(error) or type(error).__name__
            how = "it was given up" if self._is_closed else how
            raise ServerFailedError(f"{method} {path.partition('?')[0]}: {how}", timed_out=timed_out) from error

    def _parsed(self, answer: _Answer) -> Json:
        """The body of an answer.

        Raises:
            ServerFailedError: The server is broken.
            ConfigError: It refused the request.
        """
        path = answer.path
        if answer.status in (400, 401, 403, 404, 413, 422):
            got = f"{path} answers {answer.status}: {answer.text[:300]}"
            raise self._refused(got, "a request that it serves", "correct what it names")
        if answer.status != 200:
            raise ServerFailedError(f"{path} answers {answer.status}: {answer.text[:300]}")
        try:
            body: Json = json.loads(answer.content or b"{}")
        except ValueError as error:
            raise ServerFailedError(f"{path} answers no JSON: {answer.text[:100]}") from error
        return body

    def _refused(self, got: str, allowed: str, fix: str) -> ConfigError:
        return ConfigError(f"the server {self.url} cannot be used", got=got, allowed=allowed, fix=fix)


def transfer_flags() -> list[str]:
    """The flags of vLLM with which it takes weights from a file of its machine."""
    backend = json.dumps({"backend": wire.BACKEND})
    return ["--weight-transfer-config", backend, "--worker-extension-cls", "oldlogits.engines.protocols.vllm_worker.Extension"]


def _quoted(word: str) -> str:
    return f"'{word}'" if '"' in word else word
