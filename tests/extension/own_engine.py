"""An engine of one's own in one file: the embedded engine, with a log of what it was asked."""

from contextlib import asynccontextmanager
from typing import ClassVar

from oldlogits.core.engine import EngineKind, OpenEngine
from oldlogits.engines.embedded.engine import EngineCore
from oldlogits.engines.embedded.stepwise import EmbeddedEngine


class LoggingEngine(EmbeddedEngine):
    """Samples as the embedded engine does, and keeps the ids of requests and the versions that it was given."""

    built: ClassVar[list] = []

    def __init__(self, spec):
        super().__init__(EngineCore(spec))
        self.requests, self.versions = [], []
        self.built.append(self)

    async def generate(self, prompt_ids, sampling, request_id, *, quota=None):
        self.requests.append(request_id)
        return await super().generate(prompt_ids, sampling, request_id, quota=quota)

    async def update_weights(self, update, version):
        self.versions.append(version)
        await super().update_weights(update, version)


class OwnEngine(EngineKind):
    """What the recipe names: `engine.type = "tests.extension.own_engine:OwnEngine"`."""

    is_stepwise = True

    def build(self, spec):
        return LoggingEngine(spec)

    @asynccontextmanager
    async def open(self, spec, servers):
        engine = LoggingEngine(spec)
        yield OpenEngine(engine=engine, ready=engine.resume)
