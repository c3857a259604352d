"""The embedded engine behind vLLM's HTTP routes: what `oldlogits serve` runs.

    client --POST /inference/v1/generate-->  routes (this process)  --pipe-->  engine process
           <-- answer, when it has ended --
    trainer --/pause, /start_weight_update, /update_weights {"update_info"}, /finish_weight_update, /resume-->

Tokens in, tokens out. Weights come as a `HostCopy` of this machine, named in `update_info`. Everything but /health wants the
bearer token, where there is one; without one the routes are for this machine only, and not for pages in its browsers.
"""

from __future__ import annotations

import asyncio
import hmac
import itertools
import json
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final, Literal
from urllib.parse import urlsplit

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from oldlogits import __version__
from oldlogits.core.engine import Generation
from oldlogits.core.errors import ConfigError, OldLogitsError, WorkerDiedError
from oldlogits.engines.embedded.process import EngineProcess
from oldlogits.engines.http import messages as wire
from oldlogits.engines.http.messages import LOOPBACK, Json, typed
from oldlogits.engines.shared_memory import is_shared
from oldlogits.engines.spec import EngineSpec

SPOKEN: Final = "0.32.0"
"""The version of vLLM whose routes these are; /version names it, with this package's own behind."""

_CLIENT_LEFT: Final = 499


class Served:
    """The engine behind the routes, and the labels of its versions.

    Args:
        engine: Samples.
        spec: What it was built from.
        name: Of the model.
    """

    def __init__(self, engine: EngineProcess, spec: EngineSpec, name: str) -> None:
        self.engine, self.spec, self.name = engine, spec, name
        self._labels = {0: wire.STARTING_LABEL}  # by the engine's own version, which counts updates
        self._running: dict[str, list[str]] = {}  # the engine's ids of requests, by the ids that they are aborted under
        self._numbers = itertools.count()
        self._paused = self._updating = False

    @property
    def num_running(self) -> int:
        """Requests that were not answered yet."""
        return sum(map(len, self._running.values()))

    async def generate(self, request: wire.Request) -> wire.Answer:
        """Sample a completion."""
        known_as = wire.ABORT_PREFIX + request.request_id
        own_id = f"{request.request_id}/{next(self._numbers)}"  # the engine wants unique ones
        self._running.setdefault(known_as, []).append(own_id)
        try:
            generation = await self.engine.generate(request.token_ids, request.sampling, own_id)
        finally:
            self._running[known_as].remove(own_id)
            if not self._running[known_as]:
                del self._running[known_as]
        return self._answer(generation)

    def _answer(self, generation: Generation) -> wire.Answer:
        spans = (wire.LabelledSpan(label=self._labels[s.version], start=s.start, end=s.end) for s in generation.spans)
        return wire.Answer(
            token_ids=generation.output_ids,
            logprobs=generation.logprobs,
            spans=tuple(spans),
            finish_reason=generation.finish_reason,
            prompt_logprobs=generation.prompt_logprobs,
        )

    async def abort(self, names: list[str]) -> int:
        """End requests by the names that they are aborted under; returns how many. No name: all."""
        own_ids = [own_id for name in names or list(self._running) for own_id in self._running.get(name, [])]
        for own_id in own_ids:
            await self.engine.abort(own_id)
        return len(own_ids)

    async def pause(self, mode: str, clear_cache: bool) -> None:
        """Stop sampling. A cleared cache is computed anew with the next weights."""
        if mode not in ("keep", "abort"):
            raise _wrong(f"mode = {mode}", "keep, abort", "pause with mode=keep")
        kept: Literal["keep", "abort"] = "keep" if mode == "keep" else "abort"
        await self.engine.pause(kept, "recompute" if clear_cache else "stale")
        self._paused = True

    async def resume(self) -> None:
        """Go on sampling."""
        if self._updating:
            raise _wrong("resume within a weight update", "finish_weight_update first", "finish the update")
        await self.engine.resume()
        self._paused = False

    def check_transfer(self, info: Json) -> None:
        """Refuse a trainer whose files cannot be read here: it sends a file, and what it says."""
        fields = typed(info, dict, "init_info")
        path, nonce = typed(fields.get("path"), str, "init_info.path"), typed(fields.get("nonce"), str, "init_info.nonce")
        if not is_shared(Path(path)) or not Path(path).is_file() or Path(path).read_text(encoding="utf-8") != nonce:
            raise _wrong(f"path = {path}", "a file of this machine that says the nonce", "serve on the trainer's machine")

    def start_update(self) -> None:
        """A weight update begins."""
        if not self._paused or self._updating:
            raise _wrong("no pause" if not self._paused else "a second start", "pause, then one start", "pause first")
        self._updating = True

    async def load(self, info: Json) -> None:
        """Take over the weights of a `HostCopy`."""
        fields = typed(info, dict, "update_info")
        path = Path(typed(fields.get("path"), str, "update_info.path"))
        held = typed(fields.get("version"), int, "update_info.version")
        if not self._updating:
            raise _wrong("no update was started", "start_weight_update first", "start the update")
        if not is_shared(path) or not path.is_file():
            raise _wrong(f"path = {path}", f"a file oldlogits-*.weights in /dev/shm or {tempfile.gettempdir()}", "share it")
        version = max(self._labels) + 1
        self._labels[version] = self._labels[version - 1]
        await self.engine.load(path, held, version)

    def finish_update(self, label: str | None) -> None:
        """The update is whole: what it is called from now on."""
        if not self._updating:
            raise _wrong("no update was started", "start_weight_update first", "start the update")
        self._updating = False
        if label is not None:
            self._labels[max(self._labels)] = label

    @property
    def label(self) -> str:
        """Of the weights."""
        return self._labels[max(self._labels)]

    @property
    def is_paused(self) -> bool:
        """Whether it is."""
        return self._paused

    def describe(self) -> Json:
        """The parts of vLLM's configuration that a client reads; `additional_config` is where ours stand."""
        return {
            "vllm_config": {
                "model_config": {
                    "model": self.spec.model_path,
                    "dtype": "torch.float32",
                    "max_model_len": self.spec.max_context,
                    "logprobs_mode": "processed_logprobs",
                },
                "scheduler_config": {"max_num_seqs": self.spec.max_num_seqs},
                "weight_transfer_config": {"backend": wire.BACKEND},
                "additional_config": {
                    "oldlogits_numerics": self.spec.numerics,
                    "oldlogits_adapter_scale": self.spec.adapter_scale,
                },
            }
        }


def make_app(served: Served, *, token: str = "") -> FastAPI:
    """The routes.

    Args:
        served: The engine.
        token: Bearer token that requests must carry; empty: none, for loopback only.
    """
    app = FastAPI(title="oldlogits serve", docs_url=None, redoc_url=None, openapi_url=None)
    post = _Routes(app, "POST").add
    get = _Routes(app, "GET").add

    async def generate(request: Request) -> Response:
        number = next(served._numbers)
        room = served.spec.max_context
        asked = wire.Request.from_json(await _body(request), default_id=f"{number}", default_max_tokens=room)
        answer = await _unless_left(request, served.generate(asked))
        return Response(status_code=_CLIENT_LEFT) if answer is None else _json(answer.to_json(asked, model=served.name))

    async def abort(request: Request) -> Response:
        names = typed(await _body(request), dict, "the body").get("request_ids") or []
        return _json({"status": "aborted", "aborted": await served.abort(list(map(str, typed(names, list, "request_ids"))))})

    async def pause(request: Request) -> Response:
        clear = request.query_params.get("clear_cache", "true").lower() in ("true", "1")
        await served.pause(request.query_params.get("mode", "abort"), clear)
        return _json({"status": "paused"})

    async def resume(request: Request) -> Response:
        await served.resume()
        return _json({"status": "resumed"})

    async def init(request: Request) -> Response:
        served.check_transfer(typed(await _body(request), dict, "the body").get("init_info"))
        return _json({"message": "Weight transfer initialized"})

    async def start(request: Request) -> Response:
        served.start_update()
        return _json({"message": "Weight update started"})

    async def update(request: Request) -> Response:
        await served.load(typed(await _body(request), dict, "the body").get("update_info"))
        return _json({"message": "Weights updated"})

    async def finish(request: Request) -> Response:
        label = typed(await _body(request), dict, "the body").get("weight_version")
        served.finish_update(None if label is None else typed(label, str, "weight_version"))
        return _json({"message": "Weight update finished"})

    async def health(request: Request) -> Response:
        await served.engine.stats()
        return Response()

    async def models(request: Request) -> Response:
        card: Json = {"id": served.name, "object": "model", "owned_by": "oldlogits", "max_model_len": served.spec.max_context}
        return _json({"object": "list", "data": [card]})

    async def metrics(request: Request) -> Response:
        num = (await served.engine.stats()).num_decode_tokens
        return Response(f"# TYPE {wire.SAMPLED} counter\n{wire.SAMPLED} {num}\n", media_type="text/plain; version=0.0.4")

    post("/inference/v1/generate", generate)
    for path in ("/inference/v1/abort_requests", "/abort_requests"):
        post(path, abort)
    for path, route in {
        "/pause": pause,
        "/resume": resume,
        "/init_weight_transfer_engine": init,
        "/start_weight_update": start,
        "/update_weights": update,
        "/finish_weight_update": finish,
    }.items():
        post(path, route)
    get("/health", health)
    get("/metrics", metrics)
    get("/v1/models", models)
    for path, say in _statements(served).items():
        get(path, say)
    app.add_middleware(_Guard, token=token)
    return app


_Route = Callable[[Request], Awaitable[Response]]


def _statements(served: Served) -> dict[str, _Route]:
    """Routes that only say something."""
    says: dict[str, Callable[[], Json]] = {
        "/version": lambda: {"version": f"{SPOKEN}+oldlogits.{__version__}"},
        "/load": lambda: {"server_load": served.num_running},
        "/is_paused": lambda: {"is_paused": served.is_paused},
        "/weight_info": lambda: {"weight_version": served.label},
        "/get_world_size": lambda: {"world_size": 1},
        "/server_info": served.describe,
    }

    def route(say: Callable[[], Json]) -> _Route:
        async def answer(request: Request) -> Response:
            return _json(say())

        return answer

    return {path: route(say) for path, say in says.items()}


class _Routes:
    """Adds routes whose errors of this package become answers, in the shape of vLLM's."""

    def __init__(self, app: FastAPI, method: str) -> None:
        self._app, self._method = app, method

    def add(self, path: str, route: _Route) -> None:
        """Add a route."""

        async def guarded(request: Request) -> Response:
            try:
                return await route(request)
            except WorkerDiedError as error:
                return _error(error, 503)
            except OldLogitsError as error:
                return _error(error, 400)

        self._app.add_route(path, guarded, methods=[self._method])


class _Guard:
    """Lets in who has the token; without a token, who is on this machine and no page of a browser."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app, self._token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (reason := self._refusal(Request(scope))) is not None:
            await JSONResponse({"error": {"message": reason, "code": 401}}, status_code=401)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _refusal(self, request: Request) -> str | None:
        if request.url.path == "/health":
            return None
        if self._token:
            given = request.headers.get("authorization", "")
            matches = hmac.compare_digest(given.encode(), f"Bearer {self._token}".encode())
            return None if matches else "the bearer token is missing or wrong"
        if "origin" in request.headers:
            return "pages of a browser may not use an engine that wants no token"
        host = urlsplit(f"//{request.headers.get('host', '')}").hostname
        return None if host in LOOPBACK else f"host {host} is not this machine's loopback"


def check_host(host: str, token: str) -> None:
    """Refuse to be reached from other machines without a token.

    Raises:
        ConfigError: Neither a loopback host nor a token.
    """
    if host not in LOOPBACK and not token:
        raise ConfigError(
            "whoever reaches this engine can change its weights: other machines need a token",
            got=f"--host {host}, no token",
            allowed=f"a loopback host ({', '.join(sorted(LOOPBACK))}), or a token",
            fix="set the environment variable OLDLOGITS_TOKEN (or --token), and the same for the client",
        )


async def _unless_left(request: Request, answer: Awaitable[wire.Answer]) -> wire.Answer | None:
    """Wait for an answer as long as somebody waits for it; None: the client left, and the request is aborted."""
    working = asyncio.ensure_future(answer)
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return await working if working.done() else None
    finally:
        leaving.cancel()
        working.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _body(request: Request) -> Json:
    try:
        body: Json = json.loads(await request.body() or b"{}")
    except ValueError as error:
        raise _wrong(f"no JSON: {error}", "a JSON object", "send one") from error
    return body


def _json(value: Json) -> Response:
    return Response(json.dumps(value), media_type="application/json")


def _error(error: OldLogitsError, status: int) -> Response:
    body: Json = {"error": {"message": str(error), "type": type(error).__name__, "param": None, "code": status}}
    return Response(json.dumps(body), status_code=status, media_type="application/json")


def _wrong(got: str, allowed: str, fix: str) -> ConfigError:
    return ConfigError("the engine cannot do this now", got=got, allowed=allowed, fix=fix)
