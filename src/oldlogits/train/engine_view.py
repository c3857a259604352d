"""What the embedded engine gives tokens, computed with the trainer's own forward pass.

The engine's numerics are emulated, so its weights are a known function of the published ones: with them, the trainer's
Hugging Face model must give the engine's log-probs up to fp32 rounding, however coarse the numerics are.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from oldlogits.rollout.numerics import Numerics, round_linear, round_other, round_rows_to_e4m3


def engine_weights(model: nn.Module, numerics: Numerics) -> dict[str, Tensor]:
    """Rounded fp32 copies of the model's weights, as the engine holds them; a tied head is an entry of its own."""
    return {
        f"{path}.{name}": (round_linear if isinstance(module, nn.Linear) and name == "weight" else round_other)(
            parameter, numerics
        )
        for path, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
    }


def engine_logps(model: PreTrainedModel, token_ids: Sequence[int], numerics: Numerics) -> NDArray[np.float32]:
    """Natural-log probs of a sequence under the model with the engine's numerics, at temperature 1.

    Exact for all numerics but fp8_dynamic: where two fp32 forwards differ in a last bit, an activation on the edge
    between two e4m3 codes is rounded to the other one.

    Args:
        model: The trainer's model; it stays as it is.
        token_ids: At least two.
        numerics: The engine's.

    Returns:
        float32 [len(token_ids) - 1], of all tokens but the first.
    """
    ids = torch.tensor([list(token_ids)])
    with torch.no_grad(), ExitStack() as hooks:
        if numerics == "fp8_dynamic":
            for module in model.modules():
                if isinstance(module, nn.Linear):
                    hooks.enter_context(module.register_forward_pre_hook(_round_input))
        arguments = {"input_ids": ids, "use_cache": False}
        logits: Tensor = functional_call(model, engine_weights(model, numerics), (), arguments, tie_weights=False).logits
    logps: NDArray[np.float32] = -nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none").numpy()
    return logps


def _round_input(module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    """Round what enters a linear layer, each token with its own scale."""
    (x,) = inputs
    return round_rows_to_e4m3(x.flatten(end_dim=-2)).view_as(x)
