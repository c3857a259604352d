"""Source "balance": BALANCE, the mixture of the engine's policies over the versions that sampled the batch. Not OLD."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from oldlogits.core.errors import MissingLogprobError
from oldlogits.core.policies import BALANCE
from oldlogits.core.scoring import BatchTokens, Scored
from oldlogits.core.source import LogprobSource


class BalanceSource(LogprobSource):
    """``log sum_v a_v pi_v + (log mu_old - log pi_old)``: each token at every version of its batch, from the store.

    ``a_v`` is the share of the batch's loss tokens that version v sampled, ``pi_v`` the training engine at v. The second term
    is the engine's noise at the token's own version, taken for that at the others, which nobody has computed. ``THETA/BALANCE``
    is then the balance heuristic of multiple importance sampling (Veach and Guibas 1995, "Optimally combining sampling
    techniques for Monte Carlo rendering"): a token that one version found unlikely and others likely has no large weight.
    It is applied token by token: that other versions would have sampled other contexts is left out, as in every
    token-level ratio. A batch of one version gives MU itself. Experimental.
    """

    provides = BALANCE
    cost = "a forward of the whole batch for each of its versions; stores them"
    stores_versions = True

    async def acquire(self, batch: BatchTokens) -> Scored:
        """Score the whole batch at each of its versions, in ascending order.

        Raises:
            MissingLogprobError: The batch does not say what the engine gave its tokens.
        """
        if batch.logp_mu is None:
            raise MissingLogprobError(
                "source 'balance' needs log-probs of MU",
                got="a batch without them",
                allowed="BatchTokens with logp_mu",
                fix="pass logp_mu of the sampled tokens",
            )
        tokens = np.arange(len(batch.versions))
        distinct, counts = np.unique(batch.versions, return_counts=True)
        scores = np.stack([await self._trainer.score(tokens, int(version)) for version in distinct])
        values = balance_logp(scores, counts, np.searchsorted(distinct, batch.versions), batch.logp_mu)
        return Scored(policy=BALANCE, values=values, computed_at=batch.versions, num_switches=len(distinct))


def balance_logp(
    scores: NDArray[np.float32], counts: NDArray[np.int64], own: NDArray[np.int64], logp_mu: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Form ``log sum_v a_v pi_v + (log mu - log pi_own)`` of each token, in float64.

    Args:
        scores: float32 [version, token]; natural log-probs of each token at each version.
        counts: int64 [version]; the tokens that each version sampled; ``a_v`` is the share of all.
        own: int64 [token]; the row of the version that sampled each token.
        logp_mu: float32 [token]; what the engine gave each token.

    Example:
        One token of the first of two versions, which sampled as many tokens: pi = .2 and .6, mu = .1:
        the mixture is .4, of which the engine gives half: log .2 = -1.609.
    """
    wide = scores.astype(np.float64)
    mixture = np.logaddexp.reduce(wide + np.log(counts / counts.sum())[:, None], axis=0)
    found: NDArray[np.float32] = (mixture - np.take_along_axis(wide, own[None], axis=0)[0] + logp_mu).astype(np.float32)
    return found
