"""vLLM's protocol: its routes, what makes a server of it fit for training, and the command line that starts one."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Final, Literal, TypeVar

from oldlogits.core.engine import Generation, PauseMode, Sampling, trajectory_of
from oldlogits.core.errors import ConfigError
from oldlogits.core.server import (
    GenerateRequest,
    Json,
    LaunchSpec,
    ServerFailedError,
    ServerInfo,
    ServerProtocol,
    SharedWeights,
    Transport,
)
from oldlogits.core.weights import PolicyVersion
from oldlogits.engines.prompts import Prompts, flat
from oldlogits.engines.protocols import vllm_messages as wire

OLDEST: Final = (0, 32)
"""The first release of vLLM that says which weights sampled a token."""
UNFINISHED_LABEL: Final = "unfinished"
"""The label of weights whose update was broken off."""

_ARITHMETIC: Final[Mapping[str, str]] = {"float32": "fp32", "bfloat16": "bf16"}
_DTYPES: Final[Mapping[str, str]] = {"bf16": "bfloat16"}
_DEV_MODE: Final = "start it with the environment variable VLLM_SERVER_DEV_MODE=1, which adds the routes of weight updates"
_GENERATE: Final = "/inference/v1/generate"

M = TypeVar("M", bound=wire.Message)


class VllmProtocol(ServerProtocol):
    """Speaks to vLLM 0.32 or later, or to whatever serves the same routes."""

    numerics: ClassVar[frozenset[str]] = frozenset({"fp32", "bf16", "fp8", "int8", "int4"})
    uses_gpu: ClassVar[bool] = True
    needs: ClassVar[str] = "vllm"

    def __init__(self, http: Transport) -> None:
        super().__init__(http)
        self._written = Prompts[str, bytes]()  # as JSON, by trajectory

    @classmethod
    def command(cls, spec: LaunchSpec, port: int) -> list[str]:
        """The command line of vLLM's server; heads that its CPU kernels refuse are served as wider ones."""
        from oldlogits.engines.protocols.wide_heads import widening_of, write_wide

        e, model = spec.engine, spec.engine.model_path
        widening = widening_of(Path(model))
        if widening is not None:
            model = str(spec.servers.log_folder / "model")
            write_wide(Path(e.model_path), widening, Path(model))
        own = {"oldlogits_numerics": e.numerics, "oldlogits_head_dim": widening.narrow if widening else 0}
        if e.adapter_scale:
            own |= {"oldlogits_adapter_scale": e.adapter_scale, "oldlogits_base": e.model_path}
        return [
            *(spec.servers.python or sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model),
            *("--host", spec.address, "--port", str(port), "--seed", str(e.seed)),
            *("--max-num-seqs", str(e.max_num_seqs), "--max-model-len", str(e.max_context)),
            *("--dtype", _DTYPES.get(e.numerics, "float32"), "--additional-config", json.dumps(own)),
            *("--logprobs-mode", "processed_logprobs", "--enable-scale-out"),
            *(["--enable-return-routed-experts"] if e.returns_routing else []),
            *(*transfer_flags(), *spec.servers.flags),
        ]

    @classmethod
    def environment(cls, token: str) -> Mapping[str, str]:
        """The routes of weight updates, the token, and on a CPU a cache of 1 GiB unless it is said otherwise."""
        cache = os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")
        return {"VLLM_SERVER_DEV_MODE": "1", "VLLM_API_KEY": token, "VLLM_CPU_KVCACHE_SPACE": cache}

    @classmethod
    def flag(cls, setting: Literal["adapter_scale", "max_context"], value: str) -> str:
        """The flags of vLLM, and of `oldlogits serve`, which speaks the same routes."""
        if setting == "max_context":
            return f"--max-model-len {value} (`oldlogits serve`: --max-context)"
        own = json.dumps({"oldlogits_adapter_scale": value}).replace(f'"{value}"', value)
        return f"--adapter-scale {value} (`oldlogits serve`), --additional-config '{own}' (vLLM)"

    async def connect(self) -> ServerInfo:
        """Ask what the server can do; a refusal says how to start it so that it can."""
        later = "be vLLM 0.32 or later"
        version = str((await self._ask(wire.StateBody, "/version", later)).version)
        numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
        if numbers < OLDEST:
            refused = "vLLM 0.32 or later, which tags tokens with weight versions"
            raise self.http.refused(f"vLLM {version}", refused, "upgrade vLLM")
        said = await self._ask(wire.ServerInfoBody, "/server_info?config_format=json", _DEV_MODE)
        await self._ask(wire.StateBody, "/weight_info", _DEV_MODE)
        info = self._checked(version, said.vllm_config)
        if (await self._ask(wire.StateBody, "/is_paused", later)).is_paused:
            with contextlib.suppress(ServerFailedError, ConfigError):  # none was begun; else: weights of no version
                await self.http.control("POST", "/finish_weight_update", {"weight_version": UNFINISHED_LABEL})
            await self.resume()
        returns_routing = await self._check_generation()
        await self._check_transfer()
        return replace(info, returns_routing=returns_routing)

    def _checked(self, version: str, config: wire.ServerConfig) -> ServerInfo:
        """What the configuration says, if it is fit for training."""
        model, backend = config.model_settings, (config.weight_transfer_config or {}).get("backend")
        if backend != wire.BACKEND:
            fix = "start it with " + " ".join(f"'{word}'" if '"' in word else word for word in transfer_flags())
            raise self.http.refused(f"weight transfer backend {backend!r}", f"{wire.BACKEND!r}", fix)
        if model.logprobs_mode != "processed_logprobs":
            fix = "start it with --logprobs-mode processed_logprobs"
            got = f"logprobs of mode {model.logprobs_mode!r}"
            raise self.http.refused(got, "those of the distribution that is sampled from", fix)
        dtype = model.dtype.removeprefix("torch.")
        if dtype not in _ARITHMETIC:
            raise self.http.refused(f"dtype {dtype}", ", ".join(_ARITHMETIC), "start it with --dtype float32 or bfloat16")
        return ServerInfo(
            version=version,
            max_context=model.max_model_len,
            arithmetic=_ARITHMETIC[dtype],
            numerics=str(config.own("oldlogits_numerics") or _ARITHMETIC[dtype]),
            adapter_scale=float(str(config.own("oldlogits_adapter_scale") or 0)),
        )

    async def _check_generation(self) -> bool:
        """One token, to see that the route is there and answers in full; returns whether it says which experts it chose."""
        request = GenerateRequest(
            request_id=f"connect-{secrets.token_hex(4)}", token_ids=(0,), sampling=Sampling(max_tokens=1, temperature=1.0)
        )
        body = wire.GenerateBody.of(request).model_dump()
        reply = await self.http.call("POST", _GENERATE, body, timeout_s=self.http.control_timeout_s)
        if reply.status in (403, 404):
            raise self.http.refused(f"no {_GENERATE}", "the token-in/token-out route", "start it with --enable-scale-out")
        answer = wire.read(wire.AnswerBody, self.http.accepted(reply).content).answer(request, self.version_of)
        return all(span.routing is not None for span in answer.spans)

    async def _check_transfer(self) -> None:
        """Whether it reads the files that weights come in."""
        nonce = secrets.token_hex(8)
        path = await self.http.share(nonce)
        try:
            body = {"init_info": {"path": str(path), "nonce": nonce}}
            reply = await self.http.call(
                "POST", "/init_weight_transfer_engine", body, timeout_s=self.http.control_timeout_s
            )  # an answer that is a refusal is told apart from none
            try:
                self.http.accepted(reply)
            except (ServerFailedError, ConfigError) as error:
                fix = "run server and trainer on one machine, as one user"
                raise self.http.refused(str(error), "a server that reads the trainer's shared memory", fix) from error
        finally:
            path.unlink(missing_ok=True)

    async def generate(self, request: GenerateRequest) -> Generation:
        """Sample a completion; takes as long as it takes."""
        reply = await self.http.call("POST", _GENERATE, self._body(request), timeout_s=None)
        return wire.read(wire.AnswerBody, self.http.accepted(reply).content).answer(request, self.version_of)

    def _body(self, request: GenerateRequest) -> bytes:
        """The body of a request; the tokens that the prompt of its trajectory's last turn had are not written again."""
        tokens, name = flat(request.token_ids), trajectory_of(request.request_id)
        num_written, written = self._written.begun(name, tokens) or (0, b"")
        new = ",".join(map(str, tokens[num_written:])).encode()
        text = b",".join(filter(None, (written, new)))
        if name:
            self._written.keep(name, tokens, text)
        others = wire.GenerateBody.of(replace(request, token_ids=())).model_dump(exclude={"token_ids"})
        return b'{"token_ids": [%s], %s' % (text, json.dumps(others).encode()[1:])

    async def abort(self, request_ids: Sequence[str]) -> None:
        """End requests; their `generate` returns what was sampled so far."""
        names = [wire.ABORT_PREFIX + id for id in request_ids]
        await self.http.control("POST", "/inference/v1/abort_requests", {"request_ids": names})

    async def pause(self, mode: PauseMode) -> None:
        """Stop sampling; keys and values are computed anew afterwards."""
        await self.http.control("POST", f"/pause?mode={mode}&clear_cache=true")

    async def resume(self) -> None:
        """Go on sampling."""
        await self.http.control("POST", "/resume")

    async def update(self, weights: SharedWeights) -> None:
        """Take over weights, while the server is paused, and give them the label of their version."""
        there = await self.http.located(weights)
        await self.http.control("POST", "/start_weight_update")
        info: Json = {"path": str(there.path), "version": there.version}
        await self.http.control("POST", "/update_weights", {"update_info": info})
        await self.http.control("POST", "/finish_weight_update", {"weight_version": self.label_of(weights.version)})

    async def version(self) -> PolicyVersion:
        """Return the version of the server's weights; -1: their label is somebody else's."""
        said = wire.read(wire.StateBody, (await self.http.control("GET", "/weight_info")).content)
        return self.version_of(str(said.weight_version))

    async def check_health(self, timeout_s: float) -> None:
        """Return if the server answers that it is well."""
        reply = await self.http.call("GET", "/health", timeout_s=timeout_s)
        if reply.status != 200:
            raise ServerFailedError(f"/health answers {reply.status}")

    async def num_sampled(self, timeout_s: float) -> int | None:
        """Tokens that the server has sampled since it started; None: it does not say."""
        reply = await self.http.call("GET", "/metrics", timeout_s=timeout_s)
        counts = re.findall(rf"^{wire.SAMPLED}.* (\S+)$", reply.text, re.MULTILINE)
        return round(sum(map(float, counts))) if counts else None

    async def _ask(self, kind: type[M], path: str, remedy: str) -> M:
        """What a route says that a server fit for training has."""
        reply = await self.http.call("GET", path, timeout_s=self.http.control_timeout_s)
        if reply.status in (401, 403):
            fix = "name the environment variable that holds the token: engine.token_env"
            raise self.http.refused(f"{path} answers {reply.status}", "a token that the server accepts", fix)
        if reply.status == 404:
            raise self.http.refused(f"no {path}", "the routes of vLLM 0.32", remedy)
        return wire.read(kind, self.http.accepted(reply).content)


def transfer_flags() -> list[str]:
    """The flags of vLLM with which it takes weights from a file of its machine."""
    backend = json.dumps({"backend": wire.BACKEND})
    return ["--weight-transfer-config", backend, "--worker-extension-cls", "oldlogits.engines.protocols.vllm_worker.Extension"]
