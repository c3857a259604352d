"""A kind of server of one's own in one file: its protocol, and here also the server, which samples with the embedded engine.

POST /complete {"id", "ids", "num", "heat", "stops", "scored"} -> {"ids", "logps", "spans": [[label, start, end]], "why"}
POST /cancel {"ids"}    POST /hold    POST /go    POST /load {"path", "version", "label"}    GET /state
"""

import argparse
import asyncio
import json
import sys
from pathlib import Path

from oldlogits.core.engine import Generation, Sampling, Span
from oldlogits.core.server import ServerFailedError, ServerInfo, ServerProtocol


class OwnProtocol(ServerProtocol):
    """What the recipe names: `engine.server = "tests.extension.own_protocol:OwnProtocol"`."""

    numerics = frozenset({"fp32"})
    uses_gpu = False

    @classmethod
    def command(cls, spec, port):
        e = spec.engine
        size = ["--slots", str(e.max_num_seqs), "--context", str(e.max_context), "--seed", str(e.seed)]
        return [sys.executable, "-m", __name__, e.model_path, "--port", str(port), *size]

    async def connect(self):
        state = await self._ask("GET", "/state")
        return ServerInfo(version="1", max_context=state["context"], arithmetic="fp32", numerics="fp32", adapter_scale=0.0)

    async def generate(self, request):
        s = request.sampling
        body = {"id": request.request_id, "ids": request.token_ids, "num": s.max_tokens, "heat": s.temperature}
        body |= {"stops": s.stop_token_ids, "scored": s.prompt_logprobs}
        reply = await self.http.call("POST", "/complete", body, timeout_s=None)
        said = json.loads(self.http.accepted(reply).content)
        return Generation(
            output_ids=tuple(said["ids"]),
            logprobs=tuple(said["logps"]),
            spans=tuple(Span(version=self.version_of(label), start=start, end=end) for label, start, end in said["spans"]),
            finish_reason=said["why"],
            prompt_logprobs=tuple(said["prompt"]),
        )

    async def abort(self, request_ids):
        await self.http.control("POST", "/cancel", {"ids": list(request_ids)})

    async def pause(self, mode):
        await self.http.control("POST", "/hold", {"mode": mode})

    async def resume(self):
        await self.http.control("POST", "/go", {})

    async def update(self, weights):
        there, label = await self.http.located(weights), self.label_of(weights.version)
        await self.http.control("POST", "/load", {"path": str(there.path), "version": there.version, "label": label})

    async def version(self):
        return self.version_of((await self._ask("GET", "/state"))["label"])

    async def check_health(self, timeout_s):
        if (await self.http.call("GET", "/state", timeout_s=timeout_s)).status != 200:
            raise ServerFailedError("it is not well")

    async def num_sampled(self, timeout_s):
        return (await self._ask("GET", "/state"))["sampled"]

    async def _ask(self, method, path):
        return json.loads((await self.http.control(method, path)).content)


class OwnServer:
    def __init__(self, options):
        from oldlogits.core.engine import EngineSpec
        from oldlogits.engines.embedded.engine import EngineCore
        from oldlogits.engines.embedded.stepwise import EmbeddedEngine

        sizes = {"max_num_seqs": options.slots, "max_context": options.context, "seed": options.seed}
        self.engine = EmbeddedEngine(EngineCore(EngineSpec(model_path=options.model, **sizes)))
        self.labels = {0: "from the folder"}

    async def drive(self):
        while True:
            await asyncio.sleep(0 if self.engine.drive_once() else 0.002)

    async def complete(self, body):
        sampling = Sampling(
            max_tokens=body["num"],
            temperature=body["heat"],
            stop_token_ids=tuple(body["stops"]),
            prompt_logprobs=body["scored"],
        )
        done = await self.engine.generate(body["ids"], sampling, body["id"])
        spans = [[self.labels[span.version], span.start, span.end] for span in done.spans]
        said = {"ids": done.output_ids, "logps": done.logprobs, "spans": spans, "why": done.finish_reason}
        return {**said, "prompt": done.prompt_logprobs}

    async def cancel(self, body):
        for name in body["ids"]:
            await self.engine.abort(name)

    async def hold(self, body):
        await self.engine.pause(body["mode"], "recompute")

    async def go(self, body):
        await self.engine.resume()

    async def load(self, body):
        from oldlogits.core.weights import FullWeights
        from oldlogits.versions import HostCopy

        with HostCopy(Path(body["path"])).read(body["version"]) as weights:
            await self.engine.update_weights(FullWeights(tensors=weights), max(self.labels) + 1)
        self.labels[max(self.labels) + 1] = body["label"]

    async def state(self, body):
        sampled = (await self.engine.stats()).num_decode_tokens
        return {"label": self.labels[max(self.labels)], "context": self.engine.core.spec.max_context, "sampled": sampled}


async def serve(options):
    from aiohttp import web

    server, app = OwnServer(options), web.Application()

    def answering(method):
        async def answer(request):
            return web.json_response(await method(await request.json() if request.can_read_body else {}) or {})

        return answer

    app.router.add_get("/state", answering(server.state))
    for name in ("complete", "cancel", "hold", "go", "load"):
        app.router.add_post(f"/{name}", answering(getattr(server, name)))
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", options.port).start()
    await server.drive()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    for option in ("port", "slots", "context", "seed"):
        parser.add_argument(f"--{option}", type=int)
    asyncio.run(serve(parser.parse_args()))
