"""Ranks: the processes that hold one model together, each a shard of its weights, and that compute a batch together.

All of them make the same calls in the same order; what they exchange beside weights and gradients goes over gloo, as same-user
processes of one cluster that trust each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Final, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from oldlogits.core.errors import ConfigError, OldLogitsError
from oldlogits.models.device import CPU

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """The place of this process among those that hold the model.

    Args:
        rank: The number of this process, from 0.
        num_ranks: The number of processes.
        mesh: The mesh over all of them; None: this process holds the whole model.
        device: The device that holds this rank's part.
    """

    rank: int
    num_ranks: int
    mesh: DeviceMesh | None
    device: torch.device = CPU

    @property
    def is_first(self) -> bool:
        """Whether it is this one that writes files and answers the controller."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum tensors of one shape over the ranks, on all of them; a copy. They are on the CPU or on the ranks' devices."""
        total = values.detach().clone()
        if self.mesh is not None:
            dist.all_reduce(total)
        return total

    def on(self, device: torch.device) -> Self:
        """Give the same ranks, holding the model on a device of this kind; all of them make this call.

        Raises:
            ConfigError: They have devices of different kinds.
        """
        kinds = self.gather(device.type)
        if len(set(kinds)) > 1:
            raise ConfigError(
                "the ranks find devices of different kinds",
                got=", ".join(f"rank {rank}: {kind}" for rank, kind in enumerate(kinds)),
                allowed="a GPU for every rank, or for none",
                fix="set trainer.device = 'cpu', or look at the drivers and CUDA_VISIBLE_DEVICES of each machine",
            )
        mesh = self.mesh
        if mesh is not None and mesh.device_type != device.type:
            mesh = init_device_mesh(device.type, (self.num_ranks,))
        return replace(self, mesh=mesh, device=device)

    def gather(self, value: T) -> list[T]:
        """Give what each rank has, by rank, to all of them."""
        if self.mesh is None:
            return [value]
        found: list[T | None] = [None] * self.num_ranks
        dist.all_gather_object(found, value)
        return found  # type: ignore[return-value]

    def gather_to_first(self, value: T) -> list[T]:
        """Give what each rank has, by rank, to the first, and nothing to the others."""
        if self.mesh is None:
            return [value]
        found: list[T | None] | None = [None] * self.num_ranks if self.is_first else None
        dist.gather_object(value, found)
        return found or []  # type: ignore[return-value]

    def receive(self, value: T | None) -> T:
        """Give the value of the first rank to all of them."""
        box = [value]
        if self.mesh is not None:
            dist.broadcast_object_list(box)
        assert box[0] is not None, "the first rank gives something"
        return box[0]

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """Raise an error of this package that any rank raises inside on all of them; nothing is exchanged inside."""
        own: OldLogitsError | None = None
        try:
            yield
        except OldLogitsError as error:
            own = error
        for found in self.gather(own):
            if found is not None:
                raise found


ALONE: Final = Ranks(rank=0, num_ranks=1, mesh=None)
"""One process with the whole model."""


def join(store: dist.Store, *, rank: int, num_ranks: int, timeout_s: float) -> Ranks:  # type: ignore[name-defined]
    """Meet the other ranks.

    Args:
        store: The store in which they find each other.
        rank: The number of this process.
        num_ranks: The number of processes.
        timeout_s: After so many seconds in one exchange the others count as lost.
    """
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=num_ranks, timeout=timedelta(seconds=timeout_s))
    return Ranks(rank=rank, num_ranks=num_ranks, mesh=init_device_mesh("cpu", (num_ranks,)))


def is_lost(error: RuntimeError) -> bool:
    """Whether an error says that another rank did not answer."""
    return isinstance(error, dist.DistError) or any(name in str(error).lower() for name in ("gloo", "nccl"))
