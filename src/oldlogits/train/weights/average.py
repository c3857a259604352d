"""The trainer's weight average: which beta each version is taken in with, and when the average is reset.

after the steps on a batch:   measured lags, rho -> reset, or beta -> average takes in the new version
at publish:                   probe log-probs of the version -> how log-probs grow apart (decay "auto")
after an audited batch:       OLD against the live weights -> how its own log-probs have grown apart (decay "audited")
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

from oldlogits.config.objective.sections import ProximalConfig
from oldlogits.core.errors import RunFolderError
from oldlogits.core.weights import PolicyVersion
from oldlogits.train.audited import AuditedUpdate, LagSums
from oldlogits.versions import (
    MeasuredGrowth,
    WeightAverage,
    best_beta,
    growth_exponent,
    mean_lag_beta,
    measured_growth,
    weighted_errors,
    window_beta,
)

RECENT_LAGS: Final = 4
"""Updates whose lags count: a batch holds thousands of tokens, and where staleness changes, older ones mislead."""
RECENT_PROBES: Final = 16
"""Versions, at least, whose probe log-probs count."""
RECENT_AUDITS: Final = 4
"""Audited batches whose tokens say how log-probs grow apart."""
FORGOTTEN: Final = 1e-18
"""The share of an average below which a version counts for nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AverageReset:
    """Why the average was reset to the live weights.

    Args:
        rule: "paper", "guarded" or "audited".
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
        self._audits: deque[LagSums] = deque(maxlen=RECENT_AUDITS)  # of the live weights against OLD
        self._shares = np.ones(1)  # what each version has of the average, by age

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
        audit: AuditedUpdate | None = None,
    ) -> tuple[Mapping[str, float], AverageReset | None]:
        """Take in the masters of the version that an update has made, or reset the average to them.

        What the update measured of its masks decides about a reset, and its loss tokens by staleness about beta; where the
        recipe says so, an audit of it decides about both.

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
        if audit is not None:
            served |= self._errors(audit)
            self._audits.append(audit.live)
        reset = self._reset(version, metrics, audit)
        if reset is not None:
            self.average.reset(weights)
            self._shares, self._no_reset_before = np.ones(1), version + num_lags
            return served, reset
        chosen = self._choose_beta()
        self.average.add(weights, chosen["average/beta"])
        shares = np.append(1.0, chosen["average/beta"] * self._shares / self._shares[0])
        self._shares = shares[shares >= FORGOTTEN] / shares.sum()
        return served | chosen, None

    def _growth(self) -> MeasuredGrowth | None:
        """How log-probs of recent audits have grown apart; None: there were none, or nothing has moved."""
        if not self._audits:
            return None
        counts = np.sum([audit.counts for audit in self._audits], axis=0)
        return measured_growth(counts, np.sum([audit.squares for audit in self._audits], axis=0))

    def _errors(self, audit: AuditedUpdate) -> dict[str, float]:
        """How far the average was off OLD, how far the live weights were, and what was to be expected from audits before."""
        found = {"measured": audit.average.roots(), "live": audit.live.roots()}
        growth, counts = self._growth(), audit.average.counts
        if growth is not None:
            squares = counts * (weighted_errors(self._shares, len(counts), growth) ** 2 + growth.noise)
            found["predicted"] = LagSums(counts=counts, squares=squares).roots()
        return {f"average/error_{name}{lag}": value for name, roots in found.items() for lag, value in roots.items()}

    def _choose_beta(self) -> dict[str, float]:
        """Choose the beta for the next version, and what it was chosen from, as metrics."""
        proximal, lags = self._proximal, np.sum(self._lags, axis=0)
        if proximal.decay == "fixed":
            return {"average/beta": proximal.beta}
        if proximal.decay == "max-lag":
            return {"average/beta": window_beta(self._window)}
        if proximal.decay == "mean-lag":
            return {"average/beta": mean_lag_beta(lags)}
        measured = self._growth() if proximal.decay == "audited" else None
        if measured is not None:
            return {"average/beta": best_beta(lags, measured), "average/exponent": measured.exponent}
        exponent = growth_exponent(np.array(list(self._probes.values()), np.float64), max(2, self._window))
        return {"average/beta": best_beta(lags, exponent), "average/exponent": exponent}

    def _reset(self, version: PolicyVersion, metrics: Mapping[str, float], audit: AuditedUpdate | None) -> AverageReset | None:
        """Apply the paper's rule, ``rho < tau``; guarded: and the live weights would keep more, and none came of late.

        Audited: the live weights would have decided more like OLD, both by count and by weight.
        """
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
        if proximal.reset == "audited":
            return found if audit is not None and _is_worse_than_live(audit.errors) else None
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
            "audit_counts": torch.from_numpy(np.array([audit.counts for audit in self._audits], np.int64)),
            "audit_squares": torch.from_numpy(np.array([audit.squares for audit in self._audits], np.float64)),
            "shares": torch.from_numpy(self._shares),
        }

    def load(self, state: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
        """Go on from a `state` and averaged weights; what was measured of lags under another window is left out."""
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
        if "shares" not in state:  # it was written without: what one beta throughout would have left
            shares = (self.average.age / (1 + self.average.age)) ** np.arange(self.average.num_versions)
            self._shares = shares / shares.sum()
            return
        self._shares = state["shares"].numpy()
        audits = zip(state["audit_counts"].numpy(), state["audit_squares"].numpy(), strict=True)
        kept = [LagSums(counts=counts, squares=squares) for counts, squares in audits if len(counts) == self._window + 1]
        self._audits.extend(kept)


def _is_worse_than_live(errors: Mapping[str, float]) -> bool:
    """Whether the average has decided less like OLD than the live weights would have, by count and by weight."""
    pairs = [(errors[f"{of}error_before"], errors[f"{of}error_after"]) for of in ("", "weight_")] if errors else []
    return bool(pairs) and all(after < before for before, after in pairs)
