"""Source "aged": AGED, the arrival weights' log-prob moved along its recent drift to the token's age. Not OLD."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from oldlogits.core.policies import AGED, Provenance
from oldlogits.core.scoring import BatchTokens, Scored
from oldlogits.core.source import LogprobSource

MIN_AGE: Final = 0.5
"""Below this age of the average, in versions, the drift cannot be told from its noise: the arrival weights are used."""

MAX_REACH: Final = 2.0
"""How far beyond the average's own age the drift is followed at most, in units of that age."""


class AgedSource(LogprobSource):
    """``log pi_t + min(lag / age, 2) (log pi_ewma - log pi_t)``: each token at its own lag, from one average.

    Two points of a straight line give any other: this is OLD exactly where a token's log-prob moved at constant speed
    over the versions in the average and back to its own, and the log-prob of averaged weights is the average of their
    log-probs. A random walk has no line to follow: there a token of lag ``l > age`` is moved too far, and one whose
    log-prob stood still and then moved is moved the wrong way. Experimental.

    Where the average is younger than `MIN_AGE`, every token of the batch has the arrival weights' log-prob and is
    labelled ASYNC.
    """

    provides = AGED
    cost = "two forwards, one fp32 copy"
    keeps_average = True

    async def acquire(self, batch: BatchTokens) -> Scored:
        """Score the batch twice, with the average and with the live weights."""
        tokens = np.arange(len(batch.versions))
        average = await self._trainer.score_average(tokens)
        live = await self._trainer.score(tokens, None)
        computed_at = np.full(len(batch.versions), batch.trainer_version)
        values = aged_logp(live, average.values, batch.trainer_version - batch.versions, average.age)
        label = Provenance.ASYNC if average.age < MIN_AGE else None
        return Scored(policy=AGED, values=values, computed_at=computed_at, num_switches=2, provenance=label)


def aged_logp(
    live: NDArray[np.float32], average: NDArray[np.float32], staleness: NDArray[np.int64], age: float
) -> NDArray[np.float32]:
    """Form ``log pi_t + min(lag / age, 2) (log pi_ewma - log pi_t)``, or ``log pi_t`` where the age is below `MIN_AGE`.

    `staleness` is the lag of each token, `age` that of the average, both in versions.
    """
    if age < MIN_AGE:
        return live
    reach = np.minimum(staleness / age, MAX_REACH).astype(np.float32)
    return live + reach * (average - live)
