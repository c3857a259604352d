"""Source "rescore": RESCORE, MU less the noise that the engine's numerics add to the present weights. Not OLD."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from oldlogits.core.policies import RESCORE
from oldlogits.core.scoring import BatchTokens, Scored
from oldlogits.core.source import LogprobSource, SourceHandles
from oldlogits.core.weights import PolicyVersion


class RescoreSource(LogprobSource):
    """``log mu_old + (log pi_t - log q_t)``: the recorded log-prob, less the engine's noise at the present weights.

    ``pi_t`` is the trainer with the weights when the batch enters training, ``q_t`` the engine's numerics at the same
    weights. With the noise ``n_v = log q_v - log pi_v`` this is ``log pi_old + (n_old - n_t)``, where MU itself is
    ``log pi_old + n_old``: exact where the noise is the same at both versions, as at lag 0, and nearer to OLD than MU is
    only where noise of equal size at the two versions correlates by more than 1/2,
    ``E (n_old - n_t)^2 = 2 (1 - c) E n^2 < E n^2``. The correlation on the probe tokens is a metric of every update.
    Experimental.
    """

    provides = RESCORE
    cost = "two forwards, no storage"

    def __init__(self, handles: SourceHandles) -> None:
        super().__init__(handles)
        self._metrics: dict[str, float] = {}

    async def acquire(self, batch: BatchTokens) -> Scored:
        """Score the batch twice with the live weights, as they are and in the engine's numerics."""
        tokens = np.arange(len(batch.versions))
        live = await self._trainer.score(tokens, None)
        engine = await self._trainer.score_engine(tokens)
        self._metrics = noise_metrics(engine.noise, batch.versions, batch.trainer_version)
        computed_at = np.full(len(tokens), batch.trainer_version)
        values = engine.logp_mu + (live - engine.values)
        return Scored(policy=RESCORE, values=values, computed_at=computed_at, num_switches=1)

    def metrics(self) -> Mapping[str, float]:
        """Tell how far the engine's noise at the tokens' versions is that of the present; docs/metrics.md."""
        return self._metrics


def noise_metrics(
    noise: Mapping[PolicyVersion, NDArray[np.float32]], versions: NDArray[np.int64], trainer_version: PolicyVersion
) -> dict[str, float]:
    """Correlate the engine's noise at the tokens' versions with that at `trainer_version`: least, and mean over tokens.

    Nothing comes from an engine without noise (fp32), where the source gives MU itself.
    """
    distinct, counts = np.unique(versions, return_counts=True)
    found = np.array([correlation(noise[int(version)], noise[trainer_version]) for version in distinct])
    if np.isnan(found).any():
        return {}
    return {
        "source/noise_correlation": float(np.average(found, weights=counts)),
        "source/noise_correlation_min": float(found.min()),
    }


def correlation(left: NDArray[np.float32], right: NDArray[np.float32]) -> float:
    """Pearson's correlation, in float64; NaN where either does not vary."""
    x, y = (values - np.mean(values, dtype=np.float64) for values in (left, right))
    scale = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / scale if scale else math.nan
