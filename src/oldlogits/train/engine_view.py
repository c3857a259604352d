"""What the embedded engine gives tokens, computed with the trainer's own forward pass.

The engine's numerics are emulated, so its weights are a known function of the published ones: with them, the trainer's
Hugging Face model must give the engine's log-probs up to fp32 rounding, however coarse the numerics are.
"""

from __future__ import annotations

import copy

from torch import Tensor, nn
from transformers import PreTrainedModel

from oldlogits.policy.model import point_at
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


class EngineView:
    """A copy of the trainer's model that computes as the engine does.

    Exact for all numerics but fp8_dynamic: where two fp32 forwards differ in a last bit, an activation on the edge
    between two e4m3 codes is rounded to the other one.

    Args:
        model: The trainer's model, whose weights are taken over; it stays as it is.
        numerics: The engine's.
    """

    def __init__(self, model: PreTrainedModel, numerics: Numerics) -> None:
        self._numerics = numerics
        self.model = copy.deepcopy(model).requires_grad_(False)
        head = self.model.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach(), requires_grad=False)  # a tied head is rounded, its embedding is not
        if numerics == "fp8_dynamic":
            for module in self.model.modules():
                if isinstance(module, nn.Linear):
                    module.register_forward_pre_hook(_round_input)
        self.hold(model)

    def hold(self, model: PreTrainedModel) -> None:
        """Round the weights that the trainer's model has now, and score with them from here on."""
        point_at(self.model, engine_weights(model, self._numerics))


def _round_input(module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    """Round what enters a linear layer, each token with its own scale."""
    (x,) = inputs
    return round_rows_to_e4m3(x.flatten(end_dim=-2)).view_as(x)
