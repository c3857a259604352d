"""Loading and saving the trainer's model: a Hugging Face class, in the standard folder format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from oldlogits.core.errors import ModelFolderError

transformers_logging.disable_progress_bar()

FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe")
"""Model types that both the trainer and the embedded engine implement."""


def load_model(folder: Path) -> PreTrainedModel:
    """The model of a folder, fp32, dropout off.

    Raises:
        ModelFolderError: The folder holds no causal language model of a supported family, or not all of its weights.
    """
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelFolderError(
            "the model folder cannot be loaded",
            got=f"{folder}: {error}",
            allowed=f"a Hugging Face folder of the families {', '.join(FAMILIES)}",
            fix="check the folder with transformers' AutoModelForCausalLM.from_pretrained",
        ) from error
    if model.config.model_type not in FAMILIES:
        raise ModelFolderError(
            "the model's family is not supported",
            got=f"model_type '{model.config.model_type}' in {folder}",
            allowed=", ".join(FAMILIES),
            fix="choose a model of one of these families",
        )
    if info["missing_keys"]:
        raise ModelFolderError(
            "the model folder lacks weights, which would be drawn at random",
            got=f"{folder} without {', '.join(sorted(info['missing_keys']))}",
            allowed="every weight of the model",
            fix="copy the folder again",
        )
    return model.eval()


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder; it must have a chat template.

    Raises:
        ModelFolderError: There is no tokenizer or it has no chat template.
    """
    try:
        if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
            raise FileNotFoundError("no tokenizer file")  # transformers would make up an empty tokenizer
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelFolderError(
            "the tokenizer cannot be loaded",
            got=f"{folder}: {error}",
            allowed="a folder with tokenizer.json and tokenizer_config.json",
            fix="save the tokenizer into the model folder",
        ) from error
    if not tokenizer.chat_template:
        raise ModelFolderError(
            "the tokenizer has no chat template",
            got=str(folder),
            allowed="a tokenizer whose chat template renders system, user, assistant and tool messages",
            fix="add chat_template.jinja to the folder",
        )
    return tokenizer


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    """The forward weights under their Hugging Face names, tied ones once; views, not copies."""
    return {name: parameter.data for name, parameter in model.named_parameters()}


def point_at(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Let the model's parameters share the storage of `weights`: a switch of versions without a copy."""
    for name, parameter in model.named_parameters():
        parameter.data = weights[name]
