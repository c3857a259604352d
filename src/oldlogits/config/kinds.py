"""The registries that recipe keys name things of, and what the rules of a recipe ask of these things."""

from __future__ import annotations

from typing import ClassVar, Final

from oldlogits.core.registry import Registry


class EmbeddedTraits:
    """The embedded engine, as the rules of a recipe see it."""

    has_servers: ClassVar[bool] = False
    kv_modes: ClassVar[frozenset[str]] = frozenset({"recompute", "stale"})
    is_stepwise: ClassVar[bool] = True


class VllmTraits:
    """Servers that speak vLLM's routes, as the rules of a recipe see them."""

    has_servers: ClassVar[bool] = True
    kv_modes: ClassVar[frozenset[str]] = frozenset({"recompute"})
    is_stepwise: ClassVar[bool] = False


class VllmServerTraits:
    """What a vLLM that the run starts can round weights to, and whether it takes the GPU."""

    numerics: ClassVar[frozenset[str]] = frozenset({"fp32", "bf16", "fp8", "int8", "int4"})
    uses_gpu: ClassVar[bool] = True


class EmbeddedServerTraits:
    """The same of the embedded engine behind the same routes."""

    numerics: ClassVar[frozenset[str]] = VllmServerTraits.numerics | {"fp8_dynamic"}
    uses_gpu: ClassVar[bool] = False


_HERE: Final = __name__
ENGINES: Final = Registry[type[EmbeddedTraits] | type[VllmTraits]](
    "engine", key="engine.type", builtin={"embedded": f"{_HERE}:EmbeddedTraits", "vllm": f"{_HERE}:VllmTraits"}
)
SERVER_PROTOCOLS: Final = Registry[type[VllmServerTraits] | type[EmbeddedServerTraits]](
    "server protocol",
    key="engine.server",
    builtin={"vllm": f"{_HERE}:VllmServerTraits", "embedded": f"{_HERE}:EmbeddedServerTraits"},
)
