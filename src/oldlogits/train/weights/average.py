"""The trainer's weight average: which beta each version is taken in with, and when the average is reset.

after the steps on a batch:   measured lags, rho -> reset, or beta -> average takes in the new version
at publish:                   probe log-probs of the version -> how log-probs grow apart (decay "auto")
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oldlogits.config.schema import ProximalConfig
from oldlogits.core.errors import RunFolderError
from oldlogits.core.weights import PolicyVersion
from oldlogits.versions import WeightAverage, best_beta, growth_exponent, mean_lag_beta, window_beta

RECENT_LAGS: Final = 4
"""Updates whose lags count: a batch holds thousands of tokens, and where staleness changes, older ones mislead."""
RECENT_PROBES: Final = 16
"""Versions, at least, whose probe log-probs count."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AverageReset:
    """Why the average was reset to the live weights.

    Args:
        rule: "paper" or "guarded".
        rho: The share of loss tokens that were active in the update before it.
        tau: The share below which the rule asks for a reset.
        kept_average: The share of the first step's tokens that the band kept with the proximal policy in r_d.
        kept_live: The share that it kept with the weights before that step.
        age: The age of the average that was given up, in versions.
    """

    rule: str
    rho: float
    tau: float
    kept_average: float
    kept_live: float
    age: float


class Averaging:
    """The average under the recipe's decay and reset rules; it begins as version 0. `window` is the largest lag of a token."""

    def __init__(self, proximal: ProximalConfig, window: int, weights: Mapping[str, Tensor]) -> None:
        self._proximal, self._window = proximal, window
        self.average = WeightAverage(weights)
        self._lags: deque[NDArray[np.int64]] = deque(maxlen=RECENT_LAGS)
        self._probes: dict[PolicyVersion, NDArray[np.float32]] = {}
        self._no_reset_before: PolicyVersion = 0

    def note_probe(self, version: PolicyVersion, probe_logps: NDArray[np.float32]) -> None:
        """Take note of what a published version gives the fixed probe tokens."""
        self._probes[version] = probe_logps
        self._probes = {v: logps for v, logps in self._probes.items() if v > version - max(RECENT_PROBES, 2 * self._window)}

    def take_in(
        self,
        weights: Mapping[str, Tensor],
        version: PolicyVersion,
        metrics: Mapping[str, float],
        staleness_counts: Mapping[int, int],
    ) -> tuple[Mapping[str, float], AverageReset | None]:
        """Take in the masters of the version that an update has made, or reset the average to them.

        What the update measured of its masks decides about a reset, and its loss tokens by staleness about beta.

        Returns:
            Metrics of the average that served the update, and the reset after it; None: there was none.
        """
        num_lags = self._window + 1
        self._lags.append(np.array([staleness_counts.get(lag, 0) for lag in range(num_lags)], np.int64))
        served = {
            "average/age": self.average.age,
            "average/num_versions": float(self.average.num_versions),
            "average/stored_bytes": float(self.average.num_bytes),
        }
        reset = self._reset(version, metrics)
        if reset is not None:
            self.average.reset(weights)
            self._no_reset_before = version + num_lags
            return served, reset
        chosen = self._choose_beta()
        self.average.add(weights, chosen["average/beta"])
        return served | chosen, None

    def _choose_beta(self) -> dict[str, float]:
        """Choose the beta for the next version, and what it was chosen from, as metrics."""
        proximal, lags = self._proximal, np.sum(self._lags, axis=0)
        if proximal.decay == "fixed":
            return {"average/beta": proximal.beta}
        if proximal.decay == "max-lag":
            return {"average/beta": window_beta(self._window)}
        if proximal.decay == "mean-lag":
            return {"average/beta": mean_lag_beta(lags)}
        exponent = growth_exponent(np.array(list(self._probes.values()), np.float64), max(2, self._window))
        return {"average/beta": best_beta(lags, exponent), "average/exponent": exponent}

    def _reset(self, version: PolicyVersion, metrics: Mapping[str, float]) -> AverageReset | None:
        """Apply the paper's rule, ``rho < tau``; guarded: and the live weights would keep more, and none came of late."""
        proximal = self._proximal
        if proximal.reset == "none":
            return None
        found = AverageReset(
            rule=proximal.reset,
            rho=metrics["mask/rho"],
            tau=proximal.reset_below,
            kept_average=metrics["mask/rho_band_first"],
            kept_live=metrics["mask/rho_band_live"],
            age=self.average.age,
        )
        guard_holds = found.kept_live > found.kept_average and version >= self._no_reset_before
        return found if found.rho < found.tau and (proximal.reset == "paper" or guard_holds) else None

    def state(self) -> dict[str, Tensor]:
        """Give everything that `load` needs, but for the averaged weights themselves."""
        return {
            "counters": self.average.counters,
            "lags": torch.from_numpy(np.array(list(self._lags), np.int64)),
            "probe_versions": torch.tensor(list(self._probes), dtype=torch.int64),
            "probe_logps": torch.from_numpy(np.array(list(self._probes.values()), np.float32)),
            "no_reset_before": torch.tensor(self._no_reset_before),
        }

    def load(self, state: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
        """Go on from a `state` and averaged weights; lags that were measured under another window are left out."""
        if not state:
            raise RunFolderError(
                "the checkpoint has no weight average",
                got="a state without one",
                allowed="a checkpoint of a run whose proximal.source keeps an average, such as ewma",
                fix="resume with the recipe that the run was started with",
            )
        self.average.load(weights, state["counters"])
        lags = state["lags"].numpy()
        self._lags.extend(lags if lags.ndim == 2 and lags.shape[1] == self._window + 1 else [])
        versions, logps = state["probe_versions"].tolist(), state["probe_logps"].numpy()
        self._probes = dict(zip(versions, logps, strict=True))
        self._no_reset_before = int(state["no_reset_before"])
