"""The policy that is trained: the model of a folder as the recipe wants it, and the weights that it stands for."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from oldlogits.config.schema import ModelConfig
from oldlogits.models.adapters import A_SUFFIX, B_SUFFIX, BASE_SUFFIX, is_adapter, merged, plain_name
from oldlogits.models.load import load_model, local
from oldlogits.models.lora import add_adapters
from oldlogits.models.ranks import Ranks
from oldlogits.models.rope import fix_frequencies
from oldlogits.models.sharding import as_slice_of, whole, whole_weights


def load_policy(config: ModelConfig, folder: Path, max_context: int) -> PreTrainedModel:
    """Load the model of a folder in fp32, with adapters where the recipe has some.

    Its sequences have at most `max_context` tokens.
    """
    model = load_model(folder)
    fix_frequencies(model, max_context)
    if config.lora_rank:
        add_adapters(model, rank=config.lora_rank, alpha=config.lora_alpha, targets=config.lora_targets)
    return model


def share_base(model: nn.Module, owner: nn.Module) -> None:
    """Let a copy of a model with adapters read the base weights of the other; nothing happens where there are no adapters.

    A sharded model gathers from memory of its own and keeps its copy.
    """
    own = dict(owner.named_parameters())
    if not any(map(is_adapter, own)):
        return
    for name, parameter in model.named_parameters():
        if not is_adapter(name):
            parameter.data = own[name].data


def plain_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Make a frozen copy of the base, without adapters."""
    plain: PreTrainedModel = copy.deepcopy(model).requires_grad_(False)
    for path, module in list(plain.named_modules()):
        if path.endswith(BASE_SUFFIX):
            plain.set_submodule(path.removesuffix(BASE_SUFFIX), module)
    return plain


def folder_weights(model: PreTrainedModel, dtype: torch.dtype, scale: float, ranks: Ranks) -> dict[str, Tensor]:
    """Gather what a standard folder of the policy holds, on the CPU of the first rank; nothing on the others.

    All ranks call it. These are the forward weights by their Hugging Face names, tied ones once; with adapters in float32,
    these added.
    """
    if not scale:
        return whole_weights(model, dtype, ranks)
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, module, weight in plain_weights(model, dtype, scale):
        parameter = module.get_parameter(name.rpartition(".")[2])
        if id(parameter) in seen:
            continue
        seen.add(id(parameter))
        all_rows = whole(as_slice_of(parameter.data, weight))
        if ranks.is_first:
            found[name] = all_rows.cpu()
    return found


def plain_weights(model: nn.Module, dtype: torch.dtype, scale: float) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Yield the forward weights under their Hugging Face names, adapters added to those of the base.

    Each comes with its name and the module that has it; of a sharded model it is this rank's rows. It is in `dtype`, with
    adapters, whose product is scaled by `scale`, in float32.
    """
    parameters = dict(model.named_parameters())
    with_adapters = any(map(is_adapter, parameters))
    for path, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{own}"
            if is_adapter(name):
                continue
            weight = local(parameter.data).to(dtype)
            layer = path.removesuffix(BASE_SUFFIX)
            if own == "weight" and layer + A_SUFFIX in parameters:
                a, b = (parameters[layer + suffix].data.to(dtype) for suffix in (A_SUFFIX, B_SUFFIX))
                weight = merged(weight, whole(a), local(b), scale)
            yield plain_name(name), module, weight.to(torch.float32) if with_adapters else weight
