"""One model over several ranks: FSDP2. Each rank holds a slice of the rows of every parameter, of its gradient and its moments.

    layer forward:   all-gather its weights -> compute -> free them         backward: again, then reduce-scatter the gradient

Embedding, final norm and head are gathered with the model itself, since a tied head is the embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import MethodType
from typing import TypeVar

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from oldlogits.models.load import decoder_layers, version_parameters
from oldlogits.models.ranks import Ranks

R = TypeVar("R")

_COMPUTE = "compute"


def place_model(model: PreTrainedModel, ranks: Ranks) -> None:
    """Bring a model to the ranks' devices: of several ranks each keeps its slice of every parameter.

    The model is whole, on the CPU, and the same on all ranks; it is changed in place, so that no device ever holds all of it.
    """
    if ranks.mesh is None:
        model.to(ranks.device)
        return
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=ranks.mesh)
    fully_shard(model, mesh=ranks.mesh, reshard_after_forward=True)
    setattr(model, _COMPUTE, MethodType(_computed, model))
    register_fsdp_forward_method(model, _COMPUTE)


def in_one_forward(model: PreTrainedModel, forward: Callable[[], R]) -> R:
    """Make a forward pass that calls parts of the model, such as its base and its head: one pass of a sharded model.

    All ranks make it at the same time. What `forward` returns is no view.
    """
    if not isinstance(model, FSDPModule):
        return forward()
    result: R = getattr(model, _COMPUTE)(forward)
    return result


def whole_weights(model: PreTrainedModel, dtype: torch.dtype, ranks: Ranks) -> dict[str, Tensor]:
    """Gather a version's forward weights by name, on the CPU of the first rank; nothing on the others. All ranks call it.

    Where one process holds the model on the CPU and its masters have `dtype`, they are views of them.
    """
    found = {}
    for name, parameter in version_parameters(model).items():
        weight = whole(parameter.data.to(dtype))
        if ranks.is_first:
            found[name] = weight.cpu()
    return found


def whole(tensor: Tensor) -> Tensor:
    """Gather a tensor of which the ranks hold slices, on each of them; another tensor as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    full: Tensor = tensor.full_tensor()
    return full


def as_slice_of(parameter: Tensor, values: Tensor) -> Tensor:
    """Make values of this rank's slice of a parameter the tensor of which the ranks hold slices; they are not copied."""
    if not isinstance(parameter, DTensor):
        return values
    return _sliced(parameter, values, parameter.device_mesh)


def host_slice_of(parameter: Tensor, values: Tensor) -> Tensor:
    """Do the same with values in the host's memory, wherever the parameter is; all ranks make this call."""
    if not isinstance(parameter, DTensor):
        return values
    return _sliced(parameter, values, _host_mesh(parameter.device_mesh.size()))


@cache
def _host_mesh(num_ranks: int) -> DeviceMesh:
    return init_device_mesh("cpu", (num_ranks,))


def _sliced(parameter: DTensor, values: Tensor, mesh: DeviceMesh) -> Tensor:
    shape, stride = parameter.shape, parameter.stride()
    sliced: Tensor = DTensor.from_local(values, mesh, parameter.placements, run_check=False, shape=shape, stride=stride)
    return sliced


def _computed(model: PreTrainedModel, forward: Callable[[], R]) -> R:
    return forward()
