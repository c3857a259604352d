"""The embedded engine as a kind of engine: what a recipe may ask of it, and how it is opened."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, ClassVar

from oldlogits.core.engine import EngineKind, EngineSpec, KVMode, OpenEngine, ServerOptions

if TYPE_CHECKING:
    from oldlogits.engines.embedded.stepwise import EmbeddedEngine


class EmbeddedKind(EngineKind):
    """A small decoder of the Llama and Qwen family: a process of the run, or steps of the caller's."""

    kv_modes: ClassVar[frozenset[KVMode]] = frozenset({"recompute", "stale"})
    has_routing: ClassVar[bool] = True
    is_stepwise: ClassVar[bool] = True
    served_by: ClassVar[str] = "embedded"

    def check(self, spec: EngineSpec, servers: ServerOptions) -> None:
        """Refuse what the decoder does not compute; see `EngineKind.check`."""
        from oldlogits.engines.embedded.model_folder import decoder_config

        decoder_config(spec)

    @asynccontextmanager
    async def open(self, spec: EngineSpec, servers: ServerOptions) -> AsyncIterator[OpenEngine]:
        """Start the engine's process; its calls wait until it is ready."""
        from oldlogits.engines.embedded.process import EngineProcess

        engine = EngineProcess(spec, heartbeat_timeout_s=servers.timeouts.heartbeat_s)
        try:
            yield OpenEngine(engine=engine, ready=_at_once)
        finally:
            engine.close()

    def build(self, spec: EngineSpec) -> EmbeddedEngine:
        """Make an engine of this process."""
        from oldlogits.engines.embedded.engine import EngineCore
        from oldlogits.engines.embedded.stepwise import EmbeddedEngine

        return EmbeddedEngine(EngineCore(spec))

    def weight_bytes(self, spec: EngineSpec, *, num_parameters: int, head_parameters: int) -> int:
        """fp32 weights with a head of its own, and with adapters their base."""
        return 4 * (num_parameters + head_parameters + (num_parameters if spec.adapter_scale else 0))

    def cache_bytes(self, spec: EngineSpec, *, token_bytes: int) -> int:
        """A static cache of all sequences at their longest."""
        return spec.max_num_seqs * spec.max_context * token_bytes


async def _at_once() -> None:
    return
