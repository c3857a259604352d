"""The band that follows the engine's own noise: a quantile of ``|log r_d|`` of tokens at lag 0, over the newest versions.

train: value, the band of this update -> steps -> note ``|log old - log mu|`` of its tokens of lag 0
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oldlogits.batch.collate import TokenBatch
from oldlogits.core.weights import PolicyVersion
from oldlogits.train.consistency import CONSISTENCY_TOLERANCE
from oldlogits.train.loss_tokens import Column

QUANTILE: Final = 0.99
"""The share of the measured tokens that lie inside of the band."""
RECENT_VERSIONS: Final = 8
"""Versions whose tokens count: the noise changes with the weights, slowly."""
MOST_TOKENS: Final = 4096
"""Tokens of one version that are kept, evenly spaced in order of size."""
USUAL_BAND: Final = 1.5
"""The recipe's default, which the band is compared with; and the band itself as long as there was no token of lag 0."""


Score = Callable[[NDArray[np.int64], PolicyVersion | None], NDArray[np.float32]]
"""Scores loss tokens of the batch in training, by position, at a version; None: with the live weights."""


class MeasuredBand:
    """What ``r_d = old / mu`` of tokens of lag 0 was of late: nothing is stale in it, and no approximation of OLD."""

    def __init__(self) -> None:
        self._noise: deque[NDArray[np.float32]] = deque(maxlen=RECENT_VERSIONS)

    @property
    def is_known(self) -> bool:
        """Whether a token was measured."""
        return bool(self._noise)

    @property
    def value(self) -> float:
        """The band, above 1: the `QUANTILE` of ``|log r_d|``, at least `CONSISTENCY_TOLERANCE` nats, what fp32 rounds off."""
        if not self.is_known:
            return USUAL_BAND
        noise = np.concatenate(list(self._noise))
        return math.exp(max(float(np.quantile(noise, QUANTILE, method="higher")), CONSISTENCY_TOLERANCE))

    def of_batch(self, batch: TokenBatch, version: PolicyVersion, score: Score) -> float:
        """The band of a batch that enters training at a version: what was measured before it.

        Of the first one it is that of its own tokens of lag 0, which `score` scores with the live weights.
        """
        loss = batch.loss_mask
        fresh = np.flatnonzero((batch.version[loss] == version) & ~batch.mixed_kv[loss])
        if self.is_known or not len(fresh):
            return self.value
        first = MeasuredBand()
        first.note(score(fresh, None) - batch.logp_mu[loss][fresh])
        return first.value

    def note(self, log_r_d: NDArray[np.float32]) -> None:
        """Take in tokens of one version at lag 0; those that are not finite say nothing."""
        sizes = np.sort(np.abs(log_r_d[np.isfinite(log_r_d)]))
        if len(sizes) > MOST_TOKENS:
            sizes = sizes[np.linspace(0, len(sizes) - 1, MOST_TOKENS).round().astype(np.int64)]
        if len(sizes):
            self._noise.append(sizes)

    def note_update(self, table: Mapping[str, Column]) -> None:
        """Take in what an update has trained, by its table; keys and values of older versions are no noise of this one."""
        fresh = (np.asarray(table["staleness"]) == 0) & ~np.asarray(table["mixed_kv"], np.bool_)
        self.note(np.asarray(table["log_r_d"], np.float32)[fresh])

    @staticmethod
    def metrics(band: float, table: Mapping[str, Column]) -> dict[str, float]:
        """The band of an update, and what `USUAL_BAND` would have left active of its tokens."""
        size = np.abs(np.asarray(table["log_r_d"], np.float32))
        active = np.asarray(table["clip_mask"], np.bool_) & (size <= math.log(USUAL_BAND))
        return {"mask/band": band, "mask/rho_usual_band": float(active.mean())}

    def state(self) -> dict[str, Tensor]:
        """Give everything that `load` needs."""
        return {
            "counts": torch.tensor([len(sizes) for sizes in self._noise], dtype=torch.int64),
            "noise": torch.from_numpy(np.concatenate([np.zeros(0, np.float32), *self._noise])),
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state`; an empty one has measured nothing."""
        counts = state["counts"].tolist() if state else []
        self._noise.extend(part.numpy() for part in (torch.split(state["noise"], counts) if counts else ()))
