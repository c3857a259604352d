"""How lockstep spreads a trajectory's tokens over versions: the lag distribution as data.

A plan says how many tokens a trajectory samples while it is ``lag`` versions from being trained, for lag W, W - 1, ...,
0; at its last lag the allowance has no end. The switch points are drawn before the trajectory is sampled, so they do
not depend on what its tokens are.
"""

from __future__ import annotations

import math
import random
from typing import Literal

Lag = Literal["fresh_first", "even", "skewed", "random"]

Plan = tuple[float, ...]
"""Allowance in tokens by lag: ``plan[0]`` is that of the freshest version."""


def draw_plan(lag: Lag, window: int, tokens_per_version: int, rng: random.Random) -> Plan:
    """Draw the plan of one trajectory.

    - "fresh_first": lags 1 and 0 only.
    - "even": two versions a trajectory; over trajectories every lag of 0..W gets the same share.
    - "skewed": begins at a lag of geometric distribution (1/2), ends at lag 0: mostly fresh, a few old.
    - "random": begins at a uniform lag; every sampled token is followed by a switch with the same probability,
      1 / tokens_per_version, whatever its position.

    Args:
        lag: The distribution.
        window: W, the largest lag, >= 0.
        tokens_per_version: Mean tokens before a switch, >= 1.
        rng: The only source of randomness.

    Returns:
        W + 1 allowances; exactly one is infinite, the last that is above 0 when read from lag W down to lag 0.

    Example:
        "fresh_first", W = 2: (inf, 7, 0): at most 7 tokens at lag 1, the rest at lag 0.
    """
    allowance = [0.0] * (window + 1)
    if window == 0:
        return (math.inf,)
    if lag == "random":
        for at in range(rng.randrange(window + 1), -1, -1):
            allowance[at] = float(_geometric(1 / tokens_per_version, rng)) if at else math.inf
        return tuple(allowance)
    if lag == "fresh_first":
        first, last = 1, 0
    elif lag == "even":
        first = rng.randrange(window + 1)
        first, last = (window, 0) if first == 0 else (first, first - 1)
    else:
        first, last = min(window, _geometric(0.5, rng) - 1), 0
    allowance[first] = float(rng.randint(1, 2 * tokens_per_version - 1))
    allowance[last] = math.inf
    return tuple(allowance)


def _geometric(probability: float, rng: random.Random) -> int:
    """Trials up to the first success, >= 1."""
    if probability >= 1:
        return 1
    return 1 + int(math.log(1.0 - rng.random()) / math.log(1.0 - probability))
