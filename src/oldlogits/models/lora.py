"""LoRA by peft: adapters in a model, and the folder that holds them. The one file that imports peft.

Adapters are put into the layers of the Hugging Face model itself: everything else goes on working with it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from oldlogits.core.errors import ConfigError
from oldlogits.models.adapters import is_adapter

if TYPE_CHECKING:
    from peft import LoraConfig

_PEFT_PREFIX = "base_model.model."


def add_adapters(model: PreTrainedModel, *, rank: int, alpha: float, targets: Sequence[str]) -> None:
    """Put adapters into the named linear layers, and freeze everything else. B is zero: the model is still the base.

    Args:
        model: Changed in place; A is drawn with torch's generator.
        rank: The rows of A, at least 1.
        alpha: The adapters' product is scaled by alpha / rank.
        targets: Last parts of the names of linear layers.

    Raises:
        ConfigError: peft is not installed, or the model has no linear layer of such a name.
    """
    check_targets(model, targets)
    try:
        from peft import inject_adapter_in_model
        from peft.tuners.lora import LoraLayer
    except ImportError as error:
        allowed, fix = "peft 0.18 or newer", "pip install 'oldlogits[lora]'"
        raise ConfigError("model.lora_rank needs peft", got=str(error), allowed=allowed, fix=fix) from error
    inject_adapter_in_model(_lora_config(rank, alpha, targets), model)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False  # bf16 forward weights are read as float32
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name))


def check_targets(model: PreTrainedModel, targets: Sequence[str]) -> None:
    """Refuse names of which the model has no linear layer; it may be one without storage.

    Raises:
        ConfigError: It has none of such a name; this says which names are left.
    """
    linear = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    head = model.get_output_embeddings()
    linear -= {name.rpartition(".")[2] for name, module in model.named_modules() if module is head}
    if unknown := [target for target in targets if target not in linear]:
        left = [target for target in targets if target in linear] or sorted(linear)
        raise ConfigError(
            "model.lora_targets names layers that the model does not have, or not as linear ones",
            got=", ".join(unknown),
            allowed=", ".join(sorted(linear)),
            fix=f"set model.lora_targets = {json.dumps(left)}",
        )


def write_adapters(
    folder: Path, adapters: Mapping[str, Tensor], *, rank: int, alpha: float, targets: Sequence[str], base: str
) -> None:
    """Write all adapters of a version as ``peft.PeftModel.from_pretrained`` loads them on top of the folder `base`.

    The other arguments are those of `add_adapters`.
    """
    config = _lora_config(rank, alpha, targets)
    config.base_model_name_or_path, config.inference_mode = base, True
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    named = {_PEFT_PREFIX + name.replace(".default.", "."): tensor.contiguous() for name, tensor in adapters.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _lora_config(rank: int, alpha: float, targets: Sequence[str]) -> LoraConfig:
    from peft import LoraConfig, TaskType

    return LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=0.0, bias="none", target_modules=list(targets), task_type=TaskType.CAUSAL_LM
    )
