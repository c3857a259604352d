"""What bounds the mismatch ratio r_d: the section ``[correction]`` of a recipe. The band is a key of its own.

r_d of each token --weight_level--> the weight: weight_low .. weight_high, normalise
                  --token_low .. token_high, reject, veto--> what is masked
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Final, Literal

from annotated_types import Ge, Gt, Le, Lt

Level = Literal["token", "sequence", "geometric", "prefix"]
"""What a ratio is of: a token; the product over a sequence; its geometric mean; the product up to the token itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """What bounds the mismatch ratio r_d beside the band: levels, truncation, and the rejection of whole sequences."""

    weight_level: Level = "token"
    """The r_d that weighs a token: its own; the product or the geometric mean over its sequence; the product up to it."""
    weight_low: Annotated[float, Ge(0), Le(1)] = 0.0
    """A weight below is raised to this."""
    weight_high: Annotated[float, Ge(1)] = math.inf
    """A weight above is lowered to this (truncated importance sampling); inf: none is."""
    normalise: bool = False
    """Divide the weights by their mean over the optimizer step: over its tokens, or its sequences at another weight_level."""
    token_low: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Tokens whose own r_d is below are masked, as those outside of the band are."""
    token_high: Annotated[float, Gt(1)] = math.inf
    """Tokens whose own r_d is above are masked (with token_low: IcePop); inf: none is."""
    reject: Literal["none", "sequence", "geometric", "k3"] = "none"
    """A whole sequence is masked where this of its ratios is out of reject_low .. reject_high. sequence: the product.
    geometric: the geometric mean. k3: the mean of r - 1 - log r, an estimate of the KL divergence; it has no lower bound."""
    reject_low: Annotated[float, Ge(0), Le(1)] = 0.0
    """With reject: the least product or geometric mean of a sequence that is trained."""
    reject_high: Annotated[float, Gt(0)] = math.inf
    """With reject: the largest one; with k3 in nats."""
    veto_low: Annotated[float, Ge(0), Lt(1)] = 0.0
    """A sequence with a token whose ratio is below is masked as a whole."""
    veto_high: Annotated[float, Gt(1)] = math.inf
    """A sequence with a token whose ratio is above is masked as a whole; inf: none is."""
    ratio: Literal["mismatch", "total"] = "mismatch"
    """What reject and veto look at. mismatch: r_d. total: theta/mu, for variants whose r_d is 1."""

    @property
    def rejects(self) -> bool:
        """Whether whole sequences may be masked."""
        return self.reject != "none" or self.veto_low > 0 or self.veto_high < math.inf

    @property
    def masks(self) -> bool:
        """Whether anything may be masked beside what the band masks."""
        return self.rejects or self.token_low > 0 or self.token_high < math.inf


BAND_ALONE: Final = Correction()
"""The band on each token's own r_d, and nothing else."""
