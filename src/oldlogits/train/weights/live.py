"""The weights that are trained, and the modules that compute with them and with others in their place."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from oldlogits.core.weights import FullWeights, PolicyVersion
from oldlogits.models.device import find_device
from oldlogits.models.forward import Arithmetic, round_at_use
from oldlogits.models.head.kernel import use_kernel
from oldlogits.models.layout.decoder import lay_out
from oldlogits.models.load import named_weights, point_at, recompute_layers
from oldlogits.models.ranks import Ranks
from oldlogits.models.routing import follow_engine
from oldlogits.models.sharding import place_model, whole_weights
from oldlogits.train.spec import TrainerSpec
from oldlogits.train.weights.engine_view import EngineView
from oldlogits.train.weights.load import load_policy, share_base


@dataclass(slots=True, kw_only=True)
class LiveModel:
    """The model that is trained.

    Args:
        model: Holds the masters, sharded or whole.
        scoring: A second module without gradients, which is pointed at the weights that are to score.
        engine_view: A copy that holds the weights in the engine's numerics; None: the engine reads the forward weights.
        dtype: The type of the forward weights.
        arithmetic: What both modules compute in.
        ranks: The ranks that hold the model, on their device.
        padded_because: Why its micro-batches are padded although the recipe lays them out otherwise; empty: they are not.
        version: The version of the live weights.
    """

    model: PreTrainedModel
    scoring: PreTrainedModel
    engine_view: EngineView | None
    dtype: torch.dtype
    arithmetic: Arithmetic
    ranks: Ranks
    padded_because: str = ""
    version: PolicyVersion = 0

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """The masters by name."""
        return named_weights(self.model)

    @property
    def num_parameters(self) -> int:
        """The parameters of the model, tied ones once."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def num_trained(self) -> int:
        """The parameters that are trained: all, or those of the adapters."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def full_weights(self) -> FullWeights:
        """Give the forward weights, valid until the next step, on the first rank."""
        return FullWeights(tensors=whole_weights(self.model, self.dtype, self.ranks))


def load_live(spec: TrainerSpec, folder: Path, ranks: Ranks) -> LiveModel:
    """Load the model of a folder, and place it and the modules beside it on the ranks' device."""
    with ranks.agreeing():
        device = find_device(spec.device)
    ranks = ranks.on(device)
    with ranks.agreeing(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(spec.seed)
        model = load_policy(spec.model, folder, spec.max_context)
        padded_because = lay_out(model, spec.trainer.layout)
    dtype, arithmetic = spec.forward_dtype, spec.arithmetic
    scoring = copy.deepcopy(model).requires_grad_(False)
    point_at(scoring, {name: weight.to(dtype) for name, weight in named_weights(model).items()})
    numerics, scale = spec.engine_numerics, spec.model.adapter_scale
    routing = spec.model.routing
    engine_view = None if numerics == "fp32" else EngineView(model, numerics, dtype, scale, ranks, routing)
    if spec.trainer.activation_checkpointing:
        recompute_layers(model)
    if not padded_because:
        lay_out(scoring, spec.trainer.layout)
    for module in (model, scoring):
        follow_engine(module, routing)
        round_at_use(module, dtype, arithmetic)
        use_kernel(module, spec.trainer.head_kernel, ranks.device)
        place_model(module, ranks)
    if ranks.mesh is None:
        share_base(scoring, model)
    return LiveModel(
        model=model,
        scoring=scoring,
        engine_view=engine_view,
        dtype=dtype,
        arithmetic=arithmetic,
        ranks=ranks,
        padded_because=padded_because,
    )
