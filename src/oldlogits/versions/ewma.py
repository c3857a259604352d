"""The weights averaged over versions: the proximal policy of PPO-EWMA, one fp32 copy of the model.

An average never is a version: what it gives a token is EWMA, not OLD.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from oldlogits.core.errors import ConfigError


class WeightAverage:
    """Bias-corrected exponentially weighted average of the fp32 masters, in fp32.

    With decay ``beta_t`` at version t, version k has the weight ``w_k = beta_(k+1) * ... * beta_t``, and 1 for k = t::

        average(t) = sum_k w_k theta(k) / S_t        S_t = sum_k w_k           = beta_t S_(t-1) + 1
                   = average(t-1) + (theta(t) - average(t-1)) / S_t
        age(t)     = sum_k w_k (t - k) / S_t         age(t) S_t = beta_t S_(t-1) (age(t-1) + 1)

    For one beta throughout, ``S = (1 - beta^n) / (1 - beta)`` and ``age = beta / (1 - beta) - n beta^n / (1 - beta^n)``
    over n versions (PAPER, "Revised PPO-EWMA"). A new beta changes how fast what is there is forgotten and leaves the
    weights of the versions among themselves as they are; beta = 0 forgets everything.

    The average is kept in float32 whatever the dtype of the masters: in bf16 an increment of ``1 / S`` of a small
    change is below half a unit of the last place, and the average freezes.

    Args:
        weights: The first version, by name; its age is 0.

    Attributes:
        weights: The average by name, float32; views that the next `add` changes.
        age: The mean age of the averaged versions, in versions; 0 right after a reset.
        num_versions: The versions taken in since the last reset, that of the reset included.

    Example:
        beta = .5, versions 1, 2, 4 (one weight): (1 * .25 + 2 * .5 + 4) / 1.75 = 3; age (2 * .25 + .5) / 1.75 = .571.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._buffers, self.weights = _flat(weights)
        self._weight_sum, self.age, self.num_versions = 1.0, 0.0, 1
        self.reset(weights)

    @property
    def num_bytes(self) -> int:
        """Bytes of the average."""
        return sum(buffer.nbytes for buffer in self._buffers)

    @torch.no_grad()
    def add(self, weights: Mapping[str, Tensor], beta: float) -> None:
        """Take in the next version's masters: one pass over them and the average. `beta` is in [0, 1), else a `ConfigError`."""
        if not 0 <= beta < 1:
            raise ConfigError("beta is no decay", got=str(beta), allowed="in [0, 1)", fix="beta = W / (W + 2)")
        earlier = beta * self._weight_sum
        self._weight_sum = earlier + 1
        self.age = earlier * (self.age + 1) / self._weight_sum
        self.num_versions += 1
        for name, view in self.weights.items():
            view.lerp_(weights[name].to(torch.float32), 1 / self._weight_sum)

    @torch.no_grad()
    def reset(self, to: Mapping[str, Tensor]) -> None:
        """Forget all versions but `to`, which has age 0."""
        for name, view in self.weights.items():
            view.copy_(to[name])
        self._weight_sum, self.age, self.num_versions = 1.0, 0.0, 1

    @property
    def counters(self) -> Tensor:
        """What `load` needs beside the weights: float64 [3]."""
        return torch.tensor([self._weight_sum, self.age, self.num_versions], dtype=torch.float64)

    def load(self, weights: Mapping[str, Tensor], counters: Tensor) -> None:
        """Go on from the averaged weights and `counters` of an average of the same model."""
        self.reset(weights)
        self._weight_sum, self.age, num_versions = counters.tolist()
        self.num_versions = int(num_versions)


def _flat(weights: Mapping[str, Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """One float32 buffer per device, and the views into it that have the names and shapes of the weights."""
    buffers: list[Tensor] = []
    views: dict[str, Tensor] = {}
    for device in dict.fromkeys(weight.device for weight in weights.values()):
        here = {name: weight for name, weight in weights.items() if weight.device == device}
        sizes = [weight.numel() for weight in here.values()]
        buffers.append(torch.empty(sum(sizes), dtype=torch.float32, device=device))
        views |= {name: part.view_as(here[name]) for name, part in zip(here, torch.split(buffers[-1], sizes), strict=True)}
    return buffers, views
