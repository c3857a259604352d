"""What the embedded engine gives tokens, computed with the trainer's own forward pass.

The engine's numerics are emulated, so its weights are a known function of the published ones: with them, the trainer's
Hugging Face model must give the engine's log-probs up to fp32 rounding, however coarse the numerics are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from oldlogits.core.trajectory import RoutingMode
from oldlogits.engines.embedded.numerics import Numerics, round_linear, round_other, round_rows_to_e4m3
from oldlogits.models.forward import under
from oldlogits.models.head.logps import HeadWork, token_logps
from oldlogits.models.layout.decoder import lay_out, layout_of
from oldlogits.models.load import named_weights
from oldlogits.models.ranks import ALONE, Ranks
from oldlogits.models.routing import follow_engine
from oldlogits.models.sharding import place_model
from oldlogits.train.weights.load import plain_copy, plain_weights


def engine_weights(
    model: nn.Module, numerics: Numerics, dtype: torch.dtype = torch.float32, scale: float = 0.0
) -> Iterator[tuple[str, Tensor]]:
    """Yield rounded fp32 copies of the model's forward weights, as the engine holds them; a tied head is one of its own.

    Of a sharded model these are this rank's slices, which are whole rows, with their scales. The product of adapters, times
    `scale`, is added before rounding.
    """
    for name, module, weight in plain_weights(model, dtype, scale):
        rounded = round_linear if _is_linear(module, name.rpartition(".")[2]) else round_other
        yield name, rounded(weight, numerics)


def _is_linear(module: nn.Module, name: str) -> bool:
    """Tell whether a parameter is the weight of a linear layer, or the stacked ones of experts."""
    return name in ("gate_up_proj", "down_proj") or (isinstance(module, nn.Linear) and name == "weight")


class EngineView:
    """A copy of the trainer's model that computes as the engine does.

    Exact for all numerics but fp8_dynamic: where two fp32 forwards differ in a last bit, an activation on the edge
    between two e4m3 codes is rounded to the other one. The trainer's model is still whole when it is copied, and stays as it
    is; the copy is sharded among the ranks.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        numerics: Numerics,
        dtype: torch.dtype = torch.float32,
        scale: float = 0.0,
        ranks: Ranks = ALONE,
        routing: RoutingMode = "off",
    ) -> None:
        self._numerics, self._dtype, self._scale = numerics, dtype, scale
        self.model = plain_copy(model)
        head = self.model.get_output_embeddings()
        own = head.weight.detach().clone()  # a tied head is rounded, its embedding is not
        head.weight = nn.Parameter(own, requires_grad=False)
        if numerics == "fp8_dynamic":
            for module in (self.model.base_model, head):
                module.forward = under(_RoundedInputs, module.forward)
            head.token_logps = _logps_of_rounded_inputs
        lay_out(self.model, layout_of(model))
        follow_engine(self.model, routing)
        self.hold(model)
        place_model(self.model, ranks)

    def hold(self, model: PreTrainedModel) -> None:
        """Round the weights that the trainer's model has now, and score with them from here on: one copy, in place."""
        held = named_weights(self.model)
        for name, weight in engine_weights(model, self._numerics, self._dtype, self._scale):
            held[name].copy_(weight)


def _logps_of_rounded_inputs(
    rows: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: Tensor, work: HeadWork
) -> Tensor:
    return token_logps(round_rows_to_e4m3(rows), weight, bias, targets, temperature, work)


class _RoundedInputs(TorchFunctionMode):
    """Rounds what enters linear layers, routers and experts (`grouped_mm`), each token with its own scale."""

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Iterable[type],
        args: tuple[Tensor, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        if func in (nn.functional.linear, torch._grouped_mm):
            args = (round_rows_to_e4m3(args[0]), *args[1:])
        return func(*args, **(kwargs or {}))
