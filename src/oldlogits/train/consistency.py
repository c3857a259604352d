"""Consistency checks: fixed tokens whose log-probs say whether weights are what they are taken for."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import replace
from typing import Final

import numpy as np
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel

from oldlogits.batch.sequences import Sequences
from oldlogits.core.errors import ExactnessError
from oldlogits.core.weights import PolicyVersion
from oldlogits.train.reports import ConsistencyErrors, PackingNoise

CONSISTENCY_TOLERANCE: Final = 1e-5
"""Nats. Two fp32 forwards of the same weights differ by rounding only."""
OTHER_DEVICE_TOLERANCE: Final = 1e-4
"""Nats, between two machines or devices, which sum in other orders, as two engines do."""


def probe_of(probe_ids: Sequence[int]) -> tuple[Sequences, NDArray[np.int64]]:
    """Lay out the probe tokens as one sequence at temperature 1, and which of them are scored: all but the first."""
    n = len(probe_ids)
    ids, starts = np.asarray(probe_ids, np.int64), np.array([0, n], np.int64)
    return Sequences(token_ids=ids, temperature=np.ones(n, np.float32), starts=starts), np.arange(1, n)


def is_routed(model: nn.Module) -> bool:
    """Tell whether layers of the model choose experts for each token."""
    return any(name.endswith(".experts") for name, _ in model.named_modules())


def num_excused(sequence: NDArray[np.int64], *, routed: bool) -> int:
    """Count the tokens that may differ by more than rounding: with experts those that one tie can move, else none.

    Where two experts are chosen for equal scores up to rounding, another composition of the micro-batch may choose the other.
    That moves the token, and what attends to it: at most its sequence. Thus ``min(n / 2, max(longest, n / 100))`` of n tokens,
    rounded down, where `longest` is the number of tokens of the longest sequence; other weights move nearly all.

    Args:
        sequence: int64 [token]; the sequence of each token that is compared.
        routed: Whether the model chooses experts.

    Example:
        >>> num_excused(np.array([0, 0, 0, 0]), routed=True), num_excused(np.array([0, 0, 1, 2, 2, 3]), routed=True)
        (2, 2)
    """
    if not routed or not len(sequence):
        return 0
    n = len(sequence)
    return min(n // 2, max(int(np.unique(sequence, return_counts=True)[1].max()), n // 100))


def judged_error(errors: NDArray[np.float32], num_excused: int = 0) -> float:
    """Give the largest error, in nats, but for those that are excused; NaN: there was nothing to compare.

    An error that is not finite is never excused, and a NaN is an infinite one, since it reproduces nothing.
    """
    if not len(errors):
        return math.nan
    return float(np.sort(errors)[-1 - num_excused]) if np.isfinite(errors).all() else math.inf


def check_rescored(errors: NDArray[np.float32], noise: PackingNoise, num_excused: int = 0) -> None:
    """Refuse OLD of tokens of the current version that is not THETA before the first optimizer step, up to packing noise.

    Their mean may be 4 times the expected mean of the noise, the largest 10 times its largest, which fewer tokens have found;
    rounding of float32 is allowed in any case.

    Args:
        errors: float32 [token], in nats; what was scored in another packing against what the training forward gave.
        noise: What another packing does to log-probs of the same weights.
        num_excused: Tokens that a tie between experts may move by more.

    Raises:
        ExactnessError: They differ.
    """
    what, against = "OLD of lag-0 tokens", "THETA before the first optimizer step"
    largest, mean = (max(CONSISTENCY_TOLERANCE, bound) for bound in (10 * noise.expected_max, 4 * noise.expected_mean))
    check_consistency(judged_error(errors, num_excused), what, against, largest)
    kept = np.sort(errors)[: len(errors) - num_excused]
    if len(kept):
        check_consistency(float(kept.mean()), f"the mean {what}", against, mean)


def check_consistency(error: float, what: str, against: str, tolerance: float = CONSISTENCY_TOLERANCE) -> None:
    """Refuse `what` whose log-probs differ from `against` by more than a tolerance in nats; NaN: there was nothing to compare.

    Raises:
        ExactnessError: They differ.
    """
    if error > tolerance:
        raise ExactnessError(
            f"{what} contradicts {against}",
            got=f"log-probs differ by up to {error:.2e}",
            allowed=f"<= {tolerance:.0e}",
            fix="the store or the version tags are wrong; this is a defect, please report it with the run folder",
        )


class ConsistencyChecks:
    """What published versions gave the probe tokens, float32 [probe token], and the largest errors of the checks against it."""

    def __init__(self, score_probe: Callable[[PreTrainedModel], NDArray[np.float32]]) -> None:
        self._score_probe = score_probe
        self.published: dict[PolicyVersion, NDArray[np.float32]] = {}
        self.errors = ConsistencyErrors()
        self._restored: dict[PolicyVersion, float] = {}  # what versions of a checkpoint may be off by, until they are scored

    def check(self, module: PreTrainedModel, what: str, version: PolicyVersion) -> None:
        """Check that a module, `what` in words, gives the probe tokens what the live weights gave them at the publish.

        What a restored version gives the first time is what it is held against from then on.
        """
        found, tolerance = self._score_probe(module), self._restored.pop(version, CONSISTENCY_TOLERANCE)
        error = judged_error(np.abs(found - self.published[version]))
        if tolerance == CONSISTENCY_TOLERANCE:
            worst = float(np.fmax(self.errors.publish_max_abs_error, error))
            self.errors = replace(self.errors, publish_max_abs_error=worst)
        check_consistency(error, what, "the live weights at its publish", tolerance)
        self.published[version] = found if tolerance > CONSISTENCY_TOLERANCE else self.published[version]

    def restore(
        self, published: Mapping[PolicyVersion, NDArray[np.float32]], errors: ConsistencyErrors, *, same_arithmetic: bool
    ) -> None:
        """Take over what a checkpoint says of its versions; `same_arithmetic`: they were scored to the last bits of float32."""
        self.published, self.errors = dict(published), errors
        tolerance = CONSISTENCY_TOLERANCE if same_arithmetic else max(OTHER_DEVICE_TOLERANCE, 10 * self.noise.expected_max)
        self._restored = dict.fromkeys(published, tolerance)

    def note_checkout(self) -> None:
        """Count a checkout, whose bits the store has compared with those that were published."""
        self.errors = replace(self.errors, num_digests=self.errors.num_digests + 1)

    def note_lag0(self, error: float, rescored: float) -> None:
        """Note how far OLD was from THETA on lag-0 tokens before the first step, as used and as scored; NaN: none was."""
        self.errors = replace(
            self.errors,
            lag0_max_abs_error=float(np.fmax(self.errors.lag0_max_abs_error, error)),
            rescored_max_abs_error=float(np.fmax(self.errors.rescored_max_abs_error, rescored)),
        )

    @property
    def noise(self) -> PackingNoise:
        """What another packing does to log-probs; zeros before it was measured."""
        e = self.errors
        found = (e.packing_mean_abs_error, e.packing_max_abs_error, e.rounding_mean_abs_error, e.rounding_max_abs_error)
        mean, largest, rounding_mean, rounding_max = np.nan_to_num(found, nan=0.0).tolist()
        return PackingNoise(mean=mean, max=largest, rounding_mean=rounding_mean, rounding_max=rounding_max)

    def note_noise(self, noise: PackingNoise) -> None:
        """Note what another packing does to log-probs."""
        self.errors = replace(
            self.errors,
            packing_mean_abs_error=noise.mean,
            packing_max_abs_error=noise.max,
            rounding_mean_abs_error=noise.rounding_mean,
            rounding_max_abs_error=noise.rounding_max,
        )

    def keep(self, versions: Container[PolicyVersion]) -> None:
        """Forget what other versions gave the probe tokens."""
        self.published = {version: logps for version, logps in self.published.items() if version in versions}
