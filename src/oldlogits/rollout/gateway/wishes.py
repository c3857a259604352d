"""What requests may ask of sampling: training samples from one distribution, an evaluation honours what the engine can."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from oldlogits.core.engine import Sampling
from oldlogits.engines.chat_api.messages import ApiError, Wishes
from oldlogits.rollout.gateway.counts import GatewayCounts


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What becomes of the wishes of requests.

    Args:
        unmet: `env.unmet_wishes`: what becomes of one that is not honoured.
        honours: Whether temperature, top-p and top-k are the request's: in evaluations.
    """

    unmet: Literal["override", "refuse"] = "override"
    honours: bool = False

    def sampling(self, own: Sampling, wishes: Wishes, counts: GatewayCounts) -> Sampling:
        """Return the distribution to sample from: the run's own, but for what is honoured.

        Raises:
            ApiError: There is a wish that is not honoured, and such ones are refused.
        """
        temperature = own.temperature if wishes.temperature is None else wishes.temperature
        top_p, top_k = wishes.top_p or 1.0, max(wishes.top_k or 0, 0)
        unmet = list(wishes.others)
        if not self.honours:
            pairs = (("temperature", temperature, own.temperature), ("top_p", top_p, 1.0), ("top_k", top_k, 0))
            unmet += [name for name, value, same in pairs if value != same]
        if unmet and self.unmet == "refuse":
            raise ApiError(
                "a parameter cannot be honoured: training samples from one distribution",
                got=", ".join(unmet),
                allowed=f"temperature {own.temperature:g}, and nothing that changes the support",
                fix="leave it out, or set env.unmet_wishes = 'override'",
                code="unsupported_parameter",
            )
        counts.overridden.update(unmet)
        return replace(own, temperature=temperature, top_p=top_p, top_k=top_k) if self.honours else own
