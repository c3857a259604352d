"""Loading and saving the trainer's model: a Hugging Face class, in the standard folder format."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from oldlogits.core.errors import ModelFolderError, reading
from oldlogits.models.adapters import is_adapter
from oldlogits.models.finite import check_finite
from oldlogits.models.head.logits import check_head

transformers_logging.disable_progress_bar()


def read_model_config(folder: Path) -> PretrainedConfig:
    """Read the config of a folder.

    Raises:
        ModelFolderError: There is none, or transformers does not know the family.
    """
    with _readable(folder):
        return AutoConfig.from_pretrained(folder, local_files_only=True)


def meta_model(config: PretrainedConfig, folder: Path) -> PreTrainedModel:
    """Make the model of a config, without storage.

    Raises:
        ModelFolderError: It is no causal language model, or one that cannot be trained here.
    """
    with _readable(folder):
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        _check_trainable(model, folder)
    return model


def load_model(folder: Path) -> PreTrainedModel:
    """Load the model of a folder, of whatever family, in fp32, dropout off.

    Raises:
        ModelFolderError: The folder holds no causal language model, not all of its weights, or one that cannot be trained here.
    """
    with _readable(folder):
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
        _check_trainable(model, folder)
    if info["missing_keys"]:
        raise ModelFolderError(
            "the model folder lacks weights, which would be drawn at random",
            got=f"{folder} without {', '.join(sorted(info['missing_keys']))}",
            allowed="every weight of the model",
            fix="copy the folder again",
        )
    check_finite(dict(model.named_parameters()), folder)
    model.eval()
    with _readable(folder):
        check_head(model, folder)
    return model


def _check_trainable(model: PreTrainedModel, folder: Path) -> None:
    """Refuse a model that the scorer and the sharding could not take apart."""
    if not isinstance(model.get_output_embeddings(), nn.Linear) or model.base_model is model or not _stacks(model):
        raise ModelFolderError(
            "the trainer cannot train this model",
            got=f"a {type(model).__name__} (model_type '{model.config.model_type}') in {folder}",
            allowed="one stack of num_hidden_layers decoder layers, and a linear output head beside it",
            fix="choose another model",
        )


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Find the layers of a decoder, whatever its family calls them."""
    return _stacks(model)[0]


def _stacks(model: PreTrainedModel) -> list[nn.ModuleList]:
    num_layers = model.config.get_text_config().num_hidden_layers
    lists = (module for module in model.base_model.modules() if isinstance(module, nn.ModuleList))
    return [found for found in lists if len(found) == num_layers]


def _readable(folder: Path) -> AbstractContextManager[None]:
    """Tell whatever transformers raises on a folder as an error of that folder."""
    return reading(
        ModelFolderError,
        "the model folder cannot be loaded",
        got=str(folder),
        allowed="a Hugging Face folder of a causal language model, such as llama, qwen2, qwen3, gemma or mistral",
        fix="copy the folder again, or choose another model; transformers' AutoModelForCausalLM.from_pretrained must load it",
    )


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder.

    Raises:
        ModelFolderError: There is no tokenizer, it has no chat template, or tokens that the model does not have.
    """
    with reading(
        ModelFolderError,
        "the tokenizer cannot be loaded",
        got=str(folder),
        allowed="a folder with tokenizer.json and tokenizer_config.json",
        fix="save the tokenizer into the model folder",
    ):
        if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
            raise FileNotFoundError("no tokenizer file")  # transformers would make up an empty tokenizer
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        largest = max(tokenizer.get_vocab().values(), default=-1)
    if (folder / "config.json").is_file() and largest >= (rows := _num_embeddings(folder)):
        raise ModelFolderError(
            "the tokenizer is larger than the model's embedding",
            got=f"token {tokenizer.convert_ids_to_tokens(largest)!r} with the id {largest} in {folder}",
            allowed=f"ids below vocab_size = {rows} of config.json",
            fix="take the tokenizer that belongs to the model, or resize the model's embedding (resize_token_embeddings)",
        )
    if not tokenizer.chat_template:
        raise ModelFolderError(
            "the tokenizer has no chat template",
            got=str(folder),
            allowed="a tokenizer whose chat template renders system, user, assistant and tool messages",
            fix="add chat_template.jinja to the folder",
        )
    return tokenizer


def _num_embeddings(folder: Path) -> int:
    return int(read_model_config(folder).get_text_config().vocab_size)


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    """Give what a version consists of, by the names of parameters, tied ones once; views of the masters, not copies.

    A model with adapters gives these alone: its base never changes. A sharded one gives this rank's slice of each, which may be
    empty.
    """
    return {name: local(parameter.data) for name, parameter in version_parameters(model).items()}


def version_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Select the parameters whose values are a version: all of them, or of a model with adapters the adapters'."""
    parameters = dict(model.named_parameters())
    return {name: parameter for name, parameter in parameters.items() if is_adapter(name)} or parameters


def point_at(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Let the model's parameters share the storage of `weights`: a switch of versions without a copy.

    A sharded model takes a copy of this rank's slices, cast to its dtype: it gathers from memory of its own.
    """
    for name, parameter in version_parameters(model).items():
        if isinstance(parameter.data, DTensor):
            own = local(parameter.data)
            own.copy_(weights[name].view_as(own))
        else:
            parameter.data = weights[name]


def local(tensor: Tensor) -> Tensor:
    """This rank's slice of a tensor; a tensor that is not sharded as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    own: Tensor = tensor.to_local()
    return own


def recompute_layers(model: PreTrainedModel) -> None:
    """Checkpoint activations: only what enters a layer is kept, the rest is computed again in the backward pass."""
    for layer in decoder_layers(model):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)  # nothing is drawn


def model_of(config: PretrainedConfig, generation: GenerationConfig, weights: Mapping[str, Tensor]) -> PreTrainedModel:
    """Make a model of weights, which are not copied; its `save_pretrained` writes a standard folder, without a tokenizer.

    Args:
        config: The model's config; its dtype becomes that of the weights.
        generation: What engines take as their defaults.
        weights: All of `named_weights`, of one dtype.
    """
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=next(iter(weights.values())).dtype)
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    model.generation_config = generation
    return model
