"""What requests may ask of sampling: training samples from one distribution, elsewhere it is honoured what the engine can."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Literal

from oldlogits.core.engine import Sampling
from oldlogits.engines.chat_api.messages import ApiError, Wishes

Unmet = Literal["override", "refuse"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What becomes of the wishes of requests.

    Args:
        unmet: `env.unmet_wishes`: what becomes of one that is not honoured.
        honours: Whether temperature, top-p and top-k are the request's: in evaluations, and in `oldlogits serve`.
        key: What sets `unmet`.
    """

    unmet: Unmet = "override"
    honours: bool = False
    key: str = "env.unmet_wishes ="

    def sampling(self, own: Sampling, wishes: Wishes, overridden: Counter[str]) -> Sampling:
        """Return the distribution to sample from: one's own, but for what is honoured; what is not is counted.

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
            only = (
                f"temperature {own.temperature:g}, and nothing that changes the support: training samples from one distribution"
            )
            raise ApiError(
                "a parameter cannot be honoured",
                got=", ".join(unmet),
                allowed="temperature, top_p, top_k and the most tokens" if self.honours else only,
                fix=f"leave it out, or set {self.key} override",
                code="unsupported_parameter",
            )
        overridden.update(unmet)
        return replace(own, temperature=temperature, top_p=top_p, top_k=top_k) if self.honours else own
