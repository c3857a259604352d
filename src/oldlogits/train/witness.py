"""Witnesses of exactness: fixed tokens whose log-probs say whether weights are what they are taken for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from oldlogits.batch import Sequences
from oldlogits.core.errors import ExactnessError

WITNESS_TOLERANCE: Final = 1e-5
"""Nats. Two fp32 forwards of the same weights differ by rounding only."""


def probe_of(probe_ids: Sequence[int]) -> tuple[Sequences, NDArray[np.int64]]:
    """The probe tokens as one sequence at temperature 1, and which of them are scored: all but the first."""
    n = len(probe_ids)
    sequences = Sequences(
        token_ids=np.asarray(probe_ids, np.int64), temperature=np.ones(n, np.float32), starts=np.array([0, n], np.int64)
    )
    return sequences, np.arange(1, n)


def max_error(again: NDArray[np.float32], published: NDArray[np.float32]) -> float:
    """The largest difference in nats; a NaN is an infinite one, since it reproduces nothing."""
    return float(np.nan_to_num(np.abs(again - published), nan=np.inf).max())


def check_witness(error: float, what: str, against: str) -> None:
    """Refuse log-probs that differ by more than rounding; NaN: there was nothing to compare.

    Args:
        error: The largest difference in nats.
        what: What was compared.
        against: With what.

    Raises:
        ExactnessError: They differ.
    """
    if error > WITNESS_TOLERANCE:
        raise ExactnessError(
            f"{what} contradicts {against}",
            got=f"log-probs differ by up to {error:.2e}",
            allowed=f"<= {WITNESS_TOLERANCE:.0e}",
            fix="the store or the version tags are wrong; this is a defect, please report it with the run folder",
        )
