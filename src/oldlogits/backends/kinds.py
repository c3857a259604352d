"""The built-in backends as a recipe sees them; what they need is imported when one is opened."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, ClassVar

from oldlogits.core.backend import BackendKind
from oldlogits.core.registry import require

if TYPE_CHECKING:
    from oldlogits.loop.backend import Backend, BackendSpec


class LockstepKind(BackendKind["BackendSpec", "Backend"]):
    """One process in virtual time, bit for bit repeatable: it controls every lag."""

    controls_lag: ClassVar[bool] = True
    steps_engine: ClassVar[bool] = True

    def open(self, spec: BackendSpec) -> AbstractAsyncContextManager[Backend]:
        """Build engine and trainer in this process."""
        from oldlogits.backends.lockstep import open_lockstep

        return open_lockstep(spec)


class LocalKind(BackendKind["BackendSpec", "Backend"]):
    """Engine and trainer in processes of their own on this machine."""

    def open(self, spec: BackendSpec) -> AbstractAsyncContextManager[Backend]:
        """Start the processes."""
        from oldlogits.backends.local import open_local

        return open_local(spec)


class RayKind(BackendKind["BackendSpec", "Backend"]):
    """Actors of a Ray cluster, on one node or several."""

    on_cluster: ClassVar[bool] = True
    moves_trajectories: ClassVar[bool] = True

    def open(self, spec: BackendSpec) -> AbstractAsyncContextManager[Backend]:
        """Join or start a cluster and its actors."""
        require("ray", "ray", "aiohttp", "uvicorn", what="runtime.type = 'ray'")
        from oldlogits.backends.ray.backend import open_ray

        return open_ray(spec)
