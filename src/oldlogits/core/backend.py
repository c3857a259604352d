"""The backend: who runs engine, trainer and environments, and where.

recipe: runtime.type = "lockstep" | "local" | "ray" | "package.module:Name"
-> BACKENDS.find(name)() -> BackendKind, whose attributes say what a recipe may ask of it
-> BackendKind.open(BackendSpec) -> Backend: engine, trainer, scorer and clock for the loop (loop/backend.py)
"""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Any, ClassVar, Final, Protocol, TypeVar

from oldlogits.core.registry import Registry

Spec = TypeVar("Spec", contravariant=True)
Opened = TypeVar("Opened", covariant=True)


class BackendKind(Protocol[Spec, Opened]):
    """A kind of backend: what a recipe may ask of it, and how it is opened.

    One's own inherits from this class and defines what differs; `runtime.type = "package.module:Name"` names it. Its module
    is imported when a recipe is read, so it imports heavy packages inside its methods only.
    """

    controls_lag: ClassVar[bool] = False
    """Whether it decides how stale every token is, as the section [lockstep] says."""
    on_cluster: ClassVar[bool] = False
    """Whether it places workers on a cluster and reserves their CPUs and GPUs, as the section [ray] says."""
    steps_engine: ClassVar[bool] = False
    """Whether it steps the engine itself, in the process of the trainer and in virtual time: the engine is then given the
    trainer's own tensors, never patches."""
    moves_trajectories: ClassVar[bool] = False
    """Whether a trajectory may go on with another engine than the one that began it."""

    def open(self, spec: Spec) -> AbstractAsyncContextManager[Opened]:
        """Start the engine, the trainer and what a `BackendSpec` asks besides; on leaving nothing of it stays behind."""


BACKENDS: Final = Registry[type[BackendKind[Any, Any]]](
    "backend",
    key="runtime.type",
    builtin={
        "lockstep": "oldlogits.backends.kinds:LockstepKind",
        "local": "oldlogits.backends.kinds:LocalKind",
        "ray": "oldlogits.backends.kinds:RayKind",
    },
    needs=("open", "steps_engine"),
)
