"""Whether the weights that were read are numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from oldlogits.core.errors import ModelFolderError


def check_finite(weights: Mapping[str, Tensor], folder: Path) -> None:
    """Refuse weights that hold NaN or infinity: every log-prob would be NaN.

    Raises:
        ModelFolderError: Some do; the first of them is named.
    """
    for name, weight in weights.items():
        if weight.is_floating_point() and not weight.detach().sum(dtype=torch.float64).isfinite():
            raise ModelFolderError(
                "the model folder holds weights that are no numbers",
                got=f"NaN or infinity in {name} of {folder}",
                allowed="finite weights",
                fix="copy the folder again, or take an earlier checkpoint",
            )
