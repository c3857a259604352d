"""Calibration: the engine's own noise, where nothing is stale yet and nothing learned.

    first batch of a run: all its tokens are of the version that enters training
    -> trainer.score with the live weights: OLD -> log r_d = log old - log mu, on tokens that mu sampled
    -> what each band would mask, and what is doubtful about the recipe's

It samples nothing and only scores, before the first optimizer step: nothing that training reads depends on it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from oldlogits.batch.collate import TokenBatch
from oldlogits.config.guard import Caution, kept_at_lag_0
from oldlogits.config.schema import RunConfig
from oldlogits.core.errors import MissingLogprobError
from oldlogits.core.policies import Variant, find_variant
from oldlogits.core.scoring import ScoringHandle
from oldlogits.core.weights import PolicyVersion
from oldlogits.record.bus import EventSink
from oldlogits.record.events import Calibrated, Warned
from oldlogits.train.reports import PublishedVersion

BANDS: Final = (1.01, 1.02, 1.05, 1.1, 1.2, 1.5, 2.0, 3.0)
"""The bands that are tried, besides the recipe's."""

MISMATCH: Final = 0.01
"""Nats of mean ``|log r_d|`` above which rows with ``r_d = 1`` are warned of; what engines have: docs/guard.md."""

MEAN_ERRORS: Final = 4.0
"""Standard errors that the mean of r_d may be off 1."""

MEAN_FLOOR: Final = 1e-3
"""What it may be off in any case: rounding has no standard error."""

ROUNDING: Final = 1e-5
"""Nats: what two fp32 forwards differ by, where less was measured."""

IN_DOUBT: Final = 0.01
"""Nats of mean ``-log mu`` above which tokens are not certain, so that numerics must show."""


@dataclass(slots=True, kw_only=True)
class Calibrator:
    """Measures once in a run, before its first optimizer step, what the engine's own noise makes of the recipe's band.

    Args:
        num_trajectories: Trajectories of the first batch that are measured; 0: none, and the engine is not judged.
        numerics: The engine's, as the recipe calls them.
        variant: The run's variant.
        band: The run's band on r_d; inf where it is measured.
        kept: The smallest and the largest ``old / mu`` that the run's mask keeps at lag 0; 0 and inf without a mask.
        enough_kept: The share of kept tokens below which the band is doubtful.
    """

    num_trajectories: int
    numerics: str
    variant: Variant
    band: float
    kept: tuple[float, float]
    enough_kept: float
    trainer: ScoringHandle
    events: EventSink
    _expected_noise: float = field(default=0.0, init=False)

    @classmethod
    def of(cls, config: RunConfig, trainer: ScoringHandle, events: EventSink) -> Calibrator:
        """Build the calibrator of a recipe."""
        return cls(
            num_trajectories=config.eval.num_calibration,
            numerics=config.engine.precision,
            variant=find_variant(config.variant),
            band=config.fixed_band,
            kept=kept_at_lag_0(config),
            enough_kept=config.proximal.reset_below,
            trainer=trainer,
            events=events,
        )

    def expect(self, published: PublishedVersion) -> None:
        """Note what the engine's numerics change the probe tokens' log-probs by at most, with the weights just published."""
        self._expected_noise = float(abs(published.engine_probe_logps - published.probe_logps).max())

    async def measure(
        self, batch: TokenBatch, *, version: PolicyVersion, packing_noise: float = math.nan, rounding_noise: float = math.nan
    ) -> None:
        """Measure on evenly spaced trajectories of the first batch of a run, sampled by the live weights of this version.

        `packing_noise` is the largest difference that another packing of tokens made, in nats, and `rounding_noise` what the
        trainer's arithmetic rounds off, which bounds it in packings that were not tried; NaN: it was not measured.

        Raises:
            MissingLogprobError: The engine's log-probs are the trainer's, though the engine's numerics give others.
        """
        self._warn(self.band_in_noise(float(np.fmax(packing_noise, rounding_noise))), version)
        num = min(self.num_trajectories, batch.num_sequences)
        if not num:
            return
        chosen = np.linspace(0, batch.num_sequences - 1, num).astype(np.int64)
        sequence = batch.sequence[batch.loss_mask]
        tokens = np.flatnonzero(np.isin(sequence, chosen))
        old, mu = await self.trainer.score(tokens, None), batch.logp_mu[batch.loss_mask][tokens]
        rounding = float(np.fmax(ROUNDING, packing_noise))
        _refuse_substitute(self.numerics, self._expected_noise, old, mu, rounding)
        found = self.figures(old - mu, sequence[tokens], version=version)
        self.events.emit(found)
        self._warn(self.doubts(found), version)

    def _warn(self, cautions: Iterable[Caution], version: PolicyVersion) -> None:
        for caution in cautions:
            self.events.emit(Warned(version=version, **asdict(caution)))

    def band_in_noise(self, noise: float) -> Iterator[Caution]:
        """What a band says that is tighter than what another packing of the same tokens does to their log-probs, in nats."""
        if not self.variant.r_d.is_one and math.log(self.band) < noise:
            yield Caution(
                name="band-in-noise",
                message=f"band {self.band:g} is {math.log(self.band):.1e} nats wide to each side, and packing alone can move "
                f"OLD by up to {noise:.1e}: a band of {math.exp(2 * noise):.4g} or more stands above it",
                figures={"band": self.band, "noise_max": noise},
            )

    def figures(self, log_r_d: NDArray[np.float32], sequence: NDArray[np.int64], *, version: PolicyVersion) -> Calibrated:
        """The figures of a calibration, of ``r_d = old / mu`` of tokens that mu sampled at lag 0.

        Means and maxima are over the finite ratios, and a ratio that is not finite counts as masked. The expected mean of r_d
        is 1; its standard error is clustered by trajectory, and inf with fewer than two. `kept` is what the recipe's own mask
        keeps: rho at lag 0, before the first step; 1 where it has no mask.

        Args:
            log_r_d: float32 [token], natural logs.
            sequence: int64 [token]; the trajectory of each.
            version: The version that sampled them.
        """
        has_band = math.isfinite(self.band) and not self.variant.r_d.is_one
        bands = sorted({*BANDS, self.band} if has_band else BANDS)
        low, high = self.kept
        finite = np.isfinite(log_r_d)
        size = np.abs(log_r_d[finite])
        r_d = np.exp(log_r_d[finite].astype(np.float64))
        mean = float(r_d.mean()) if len(r_d) else math.nan
        return Calibrated(
            version=version,
            num_trajectories=len(np.unique(sequence)),
            num_tokens=len(log_r_d),
            log_r_d_abs_mean=float(size.mean()) if len(size) else math.nan,
            log_r_d_abs_max=float(size.max()) if len(size) else math.nan,
            r_d_mean=mean,
            r_d_mean_error=_clustered_error(r_d - mean, sequence[finite]),
            bands=tuple(bands),
            masked=tuple(_outside(log_r_d, 1 / band, band) for band in bands),
            kept=1 - _outside(log_r_d, low, high),
        )

    def doubts(self, found: Calibrated) -> Iterator[Caution]:
        """What the figures say about the recipe."""
        variant, tau = self.variant, self.enough_kept
        if not variant.r_d.is_one and found.kept < tau:
            enough = next((band for band, share in zip(found.bands, found.masked, strict=True) if 1 - share >= tau), None)
            yield Caution(
                name="tight-band",
                message=f"band {self.band:g} keeps {found.kept:.1%} of the tokens at lag 0, less than proximal.reset_below = "
                f"{tau:g}: it masks the engine's own noise" + (f"; band = {enough:g} would keep enough" if enough else ""),
                figures={"band": self.band, "kept": found.kept, "tau": tau},
            )
        if variant.r_d.is_one and found.log_r_d_abs_mean > MISMATCH:
            where = "the clipped ratio" if variant.corrects_mismatch else "the gradient, uncorrected"
            yield Caution(
                name="mismatch",
                message=f"r_d = 1 leaves the difference between the engines in {where}: mean |log r_d| = "
                f"{found.log_r_d_abs_mean:.3f} nats at lag 0, above {MISMATCH:g}; variant 'decoupled_exact' takes it out",
                figures={"log_r_d_abs_mean": found.log_r_d_abs_mean, "threshold": MISMATCH},
            )
        if abs(found.r_d_mean - 1) > max(MEAN_ERRORS * found.r_d_mean_error, MEAN_FLOOR):
            yield Caution(
                name="two-distributions",
                message=f"the mean of r_d over tokens that mu sampled is {found.r_d_mean:.4f} +- {found.r_d_mean_error:.4f}, "
                "not 1: the engine's log-probs are not those of the distribution that it samples from (temperature, support)",
                figures={"r_d_mean": found.r_d_mean, "r_d_mean_error": found.r_d_mean_error},
            )


def _refuse_substitute(
    numerics: str, expected_noise: float, old: NDArray[np.float32], mu: NDArray[np.float32], rounding: float
) -> None:
    """Refuse a ratio of 1 where the numerics show with these weights: on tokens that were in doubt, not certain anyway.

    They do not show in fp32, nor with weights that lie on the numerics' grid, as those of a checkpoint in bf16 do on bf16's.
    """
    if expected_noise > rounding and float(mu.mean()) < -IN_DOUBT and float(np.abs(old - mu).max()) <= rounding:
        raise MissingLogprobError(
            f"r_d is 1 on all {len(mu)} tokens, though the engine computes in {numerics}: its log-probs are not its own",
            got=f"|log-prob of the trainer - of the engine| <= {rounding:.0e}, and {expected_noise:.0e} expected on the probe",
            allowed="the log-probs that the engine sampled with",
            fix="do not recompute them with the trainer; if the engine computes as the trainer does, engine.precision = 'fp32'",
        )


def _outside(log_r_d: NDArray[np.float32], low: float, high: float) -> float:
    """The share of tokens whose r_d is not in ``[low, high]``, compared in log space as the objective's band is."""
    log_low = math.log(low) if low > 0 else -math.inf
    kept = np.isfinite(log_r_d) & (log_r_d >= log_low) & (log_r_d <= math.log(high))
    return 1 - float(kept.mean())


def _clustered_error(deviation: NDArray[np.float64], cluster: NDArray[np.int64]) -> float:
    """The standard error of a mean of clustered values: ``sqrt(C / (C - 1) * sum over clusters of (sum of d)^2) / N``."""
    sums = np.bincount(np.unique(cluster, return_inverse=True)[1], weights=deviation)
    num = len(sums)
    return math.sqrt(num / (num - 1) * float(sums @ sums)) / len(deviation) if num > 1 else math.inf
