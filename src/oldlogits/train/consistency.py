"""Consistency checks: fixed tokens whose log-probs say whether weights are what they are taken for."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Sequence
from dataclasses import replace
from typing import Final

import numpy as np
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel

from oldlogits.batch.sequences import Sequences
from oldlogits.core.errors import ExactnessError
from oldlogits.core.weights import PolicyVersion
from oldlogits.train.reports import ConsistencyErrors

CONSISTENCY_TOLERANCE: Final = 1e-5
"""Nats. Two fp32 forwards of the same weights differ by rounding only."""
OTHER_DEVICE_TOLERANCE: Final = 1e-4
"""Nats, between a CPU and a GPU, which sum in other orders, as two engines do."""


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

    def check(
        self, module: PreTrainedModel, what: str, published: NDArray[np.float32], tolerance: float = CONSISTENCY_TOLERANCE
    ) -> None:
        """Check that a module, `what` in words, gives the probe tokens what the live weights gave them at the publish."""
        error = judged_error(np.abs(self._score_probe(module) - published))
        worst = float(np.fmax(self.errors.publish_max_abs_error, error))
        self.errors = replace(self.errors, publish_max_abs_error=worst)
        check_consistency(error, what, "the live weights at its publish", tolerance)

    def note_lag0(self, error: float) -> None:
        """Note how far OLD was from THETA on lag-0 tokens before the first optimizer step; NaN: there were none."""
        self.errors = replace(self.errors, lag0_max_abs_error=float(np.fmax(self.errors.lag0_max_abs_error, error)))

    def keep(self, versions: Container[PolicyVersion]) -> None:
        """Forget what other versions gave the probe tokens."""
        self.published = {version: logps for version, logps in self.published.items() if version in versions}
