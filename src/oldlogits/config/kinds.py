"""The registries that recipe keys name things of, and what the rules of a recipe ask of these things."""

from __future__ import annotations

from typing import Any, ClassVar, Final

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


class LocalTraits:
    """Processes of one machine."""

    section: ClassVar[str] = ""
    steps_engine: ClassVar[bool] = False
    moves_trajectories: ClassVar[bool] = False


class LockstepTraits(LocalTraits):
    """One process in virtual time: it steps the engine itself, and controls every lag."""

    section: ClassVar[str] = "lockstep"
    steps_engine: ClassVar[bool] = True


class RayTraits(LocalTraits):
    """Actors of a cluster: each worker has one server of its own, and a trajectory may go on with another worker."""

    section: ClassVar[str] = "ray"
    moves_trajectories: ClassVar[bool] = True


_HERE: Final = __name__
ENGINES: Final = Registry[type[EmbeddedTraits] | type[VllmTraits]](
    "engine", key="engine.type", builtin={"embedded": f"{_HERE}:EmbeddedTraits", "vllm": f"{_HERE}:VllmTraits"}
)
SERVER_PROTOCOLS: Final = Registry[type[VllmServerTraits] | type[EmbeddedServerTraits]](
    "server protocol",
    key="engine.server",
    builtin={"vllm": f"{_HERE}:VllmServerTraits", "embedded": f"{_HERE}:EmbeddedServerTraits"},
)
BACKENDS: Final = Registry[type[LocalTraits]](
    "runtime",
    key="runtime.type",
    builtin={"lockstep": f"{_HERE}:LockstepTraits", "local": f"{_HERE}:LocalTraits", "ray": f"{_HERE}:RayTraits"},
)
PARSERS: Final = Registry[Any](
    "parser",
    key="env.parser",
    builtin={"plain": "oldlogits.envs.shape:parse_plain", "hermes": "oldlogits.envs.shape:parse_hermes"},
)
