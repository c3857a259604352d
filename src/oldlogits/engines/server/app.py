"""The embedded engine behind vLLM's HTTP routes: what `oldlogits serve` runs.

    client --POST /inference/v1/generate-->  routes (this process)  --pipe-->  engine process
           <-- answer, when it has ended --
    agent   --POST /v1/chat/completions, /v1/responses, /v1/messages-->  chat.py  --tokens--> the same engine
    trainer --/pause, /start_weight_update, /update_weights {"update_info"}, /finish_weight_update, /resume-->

Tokens in, tokens out, but for the chat routes. Weights come as a `HostCopy` of this machine, named in `update_info`. Everything
but /health wants the token, where there is one; without one the routes are for this machine only, and not for pages in its
browsers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Final

from fastapi import APIRouter, Body, Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from oldlogits import __version__
from oldlogits.core.engine import PauseMode
from oldlogits.core.errors import ConfigError, OldLogitsError, WorkerDiedError
from oldlogits.core.server import LOOPBACK, SharedWeights
from oldlogits.engines.chat_api.routes import chat_routes
from oldlogits.engines.http.pending import unless
from oldlogits.engines.protocols import vllm_messages as wire
from oldlogits.engines.server.chat import OVERRIDDEN, ServedChat
from oldlogits.engines.server.limits import Guard, Limits, StrictRoute, refused
from oldlogits.engines.server.served import Served

SPOKEN: Final = "0.32.0"
"""The version of vLLM whose routes these are; /version names it, with this package's own behind."""

_CLIENT_LEFT: Final = 499

routes = APIRouter(route_class=StrictRoute)


def _served(request: Request) -> Served:
    served: Served = request.app.state.served
    return served


Engine = Annotated[Served, Depends(_served)]
Said = Mapping[str, object]


def make_app(served: Served, limits: Limits, *, token: str = "", chat: ServedChat | None = None) -> FastAPI:
    """Make the app of the routes; requests must carry the token, or come from loopback where it is empty.

    Args:
        served: The engine.
        limits: What requests may take.
        token: What they must carry.
        chat: Answers the chat routes; None: there are none.
    """
    app = FastAPI(title="oldlogits serve", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.served, app.state.chat = served, chat
    app.include_router(routes)
    if chat is not None:
        app.router.routes.extend(chat_routes(chat.answer, lambda http: served.name))
    app.add_exception_handler(OldLogitsError, _told)
    app.add_exception_handler(RequestValidationError, _told)
    app.add_exception_handler(HTTPException, _told)
    app.add_middleware(Guard, token=token, limits=limits)
    return app


@routes.post("/inference/v1/generate")
async def _generate(body: wire.GenerateBody, request: Request, served: Engine) -> Response:
    asked = body.request(default_id=f"{next(served.numbers)}", default_max_tokens=served.spec.max_context)
    answer = await unless(_left(request), served.generate(asked))
    if answer is None:
        return Response(status_code=_CLIENT_LEFT)
    said = wire.AnswerBody.of(answer, asked, model=served.name, labels=served.labels)
    return Response(said.model_dump_json(), media_type="application/json")


@routes.post("/inference/v1/abort_requests")
@routes.post("/abort_requests")
async def _abort(served: Engine, request_ids: Annotated[list[str] | None, Body(embed=True)] = None) -> Said:
    return {"status": "aborted", "aborted": await served.abort(request_ids or [])}


@routes.post("/pause")
async def _pause(served: Engine, mode: PauseMode = "abort", clear_cache: bool = True) -> Said:
    await served.pause(mode, clear_cache)
    return {"status": "paused"}


@routes.post("/resume")
async def _resume(served: Engine) -> Said:
    await served.resume()
    return {"status": "resumed"}


@routes.post("/init_weight_transfer_engine")
async def _init(init_info: Annotated[wire.NonceFile, Body(embed=True)], served: Engine) -> Said:
    served.check_transfer(init_info)
    return {"message": "Weight transfer initialized"}


@routes.post("/start_weight_update")
async def _start(served: Engine) -> Said:
    await served.start_update()
    return {"message": "Weight update started"}


@routes.post("/update_weights")
async def _update(update_info: Annotated[SharedWeights, Body(embed=True)], served: Engine) -> Said:
    await served.load(update_info)
    return {"message": "Weights updated"}


@routes.post("/finish_weight_update")
async def _finish(served: Engine, weight_version: Annotated[str | None, Body(embed=True, max_length=256)] = None) -> Said:
    await served.finish_update(weight_version)
    return {"message": "Weight update finished"}


@routes.get("/health")
async def _health(served: Engine) -> Response:
    await served.engine.stats()
    return Response()


@routes.get("/metrics")
async def _metrics(request: Request, served: Engine) -> Response:
    lines = [f"# TYPE {wire.SAMPLED} counter", f"{wire.SAMPLED} {(await served.engine.stats()).num_decode_tokens}"]
    chat: ServedChat | None = request.app.state.chat
    if chat is not None and chat.overridden:
        counts = sorted(chat.overridden.items())
        lines += [f"# TYPE {OVERRIDDEN} counter", *(f'{OVERRIDDEN}{{parameter="{name}"}} {num}' for name, num in counts)]
    return Response("\n".join([*lines, ""]), media_type="text/plain; version=0.0.4")


@routes.get("/v1/models")
async def _models(served: Engine) -> Said:
    card = {"id": served.name, "object": "model", "type": "model", "created": 0, "owned_by": "oldlogits"}
    return {"object": "list", "data": [{**card, "max_model_len": served.spec.max_context}], "has_more": False}


@routes.get("/version")
async def _version() -> Said:
    return {"version": f"{SPOKEN}+oldlogits.{__version__}"}


@routes.get("/load")
async def _load(served: Engine) -> Said:
    return {"server_load": served.num_running}


@routes.get("/is_paused")
async def _is_paused(served: Engine) -> Said:
    return {"is_paused": served.is_paused}


@routes.get("/weight_info")
async def _weight_info(served: Engine) -> Said:
    return {"weight_version": served.label}


@routes.get("/get_world_size")
async def _world_size() -> Said:
    return {"world_size": 1}


@routes.get("/server_info")
async def _server_info(served: Engine) -> Said:
    """The parts of vLLM's configuration that a client reads; `additional_config` is where ours stand."""
    spec = served.spec
    return {
        "vllm_config": {
            "model_config": {
                "model": spec.model_path,
                "dtype": "torch.float32",
                "max_model_len": spec.max_context,
                "logprobs_mode": "processed_logprobs",
            },
            "scheduler_config": {"max_num_seqs": spec.max_num_seqs},
            "weight_transfer_config": {"backend": wire.BACKEND},
            "additional_config": {"oldlogits_numerics": spec.numerics, "oldlogits_adapter_scale": spec.adapter_scale},
        }
    }


async def _told(request: Request, error: Exception) -> Response:
    """Answer with an error, in the shape of vLLM's."""
    if isinstance(error, HTTPException):
        return refused(error.status_code, error.detail)
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        error = wire.refusal(first["loc"], first.get("input"), first["msg"])
    return refused(503 if isinstance(error, WorkerDiedError) else 400, str(error), type(error).__name__)


def check_host(host: str, token: str) -> None:
    """Refuse to be reached from other machines without a token."""
    if host not in LOOPBACK and not token:
        raise ConfigError(
            "whoever reaches this engine can change its weights: other machines need a token",
            got=f"--host {host}, no token",
            allowed=f"a loopback host ({', '.join(sorted(LOOPBACK))}), or a token",
            fix="set the environment variable OLDLOGITS_TOKEN (or --token), and the same for the client",
        )


async def _left(request: Request) -> None:
    """Return when nobody waits for the answer any more."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
