"""A tiny model at several versions, and the log-probs of its own forward pass at each: what adapters are tested against."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from oldlogits.versions import PatchStore


class SeveralVersions:
    """Copies of a model that an optimizer might have made, each a number higher than the one before.

    Args:
        folder: Holds the model.
        count: The versions: 0, 1, ...
    """

    def __init__(self, folder: Path, count: int = 4) -> None:
        draw = torch.Generator().manual_seed(7)
        self.models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()]
        for _ in range(count - 1):
            model = copy.deepcopy(self.models[-1])
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.02 * torch.randn(parameter.shape, generator=draw))
            self.models.append(model)

    def weights(self, version: int) -> dict[str, torch.Tensor]:
        return dict(self.models[version].named_parameters())

    def store(self, count: int | None = None) -> PatchStore:
        """A store with the first versions."""
        store = PatchStore()
        for version in range(len(self.models) if count is None else count):
            store.publish(version, self.weights(version))
        return store

    def blank(self) -> torch.nn.Module:
        """A module of the family whose weights are none of the versions'."""
        model = copy.deepcopy(self.models[0])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(0.5)
        return model

    @torch.no_grad()
    def direct(self, version: int, token_ids: np.ndarray | list[int], temperature: float = 1.0) -> np.ndarray:
        """Log-probs of all tokens of a sequence, 0 for the first one: one plain forward pass."""
        ids = torch.as_tensor(np.asarray(token_ids))[None]
        logps = (self.models[version](ids).logits[0, :-1].double() / temperature).log_softmax(-1)
        return np.concatenate([[0.0], logps.gather(1, ids[0, 1:, None])[:, 0].numpy()])

    def old(self, token_ids: np.ndarray, versions: np.ndarray, temperature: float = 1.0) -> np.ndarray:
        """Each token's log-prob at its own version; 0 where it has none."""
        out = np.zeros(len(token_ids))
        for version in sorted({int(v) for v in versions if v >= 0}):
            out[versions == version] = self.direct(version, token_ids, temperature)[versions == version]
        return out
