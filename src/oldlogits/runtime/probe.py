"""After each weight update: does the engine give a fixed prompt what the trainer says its weights must give it?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from oldlogits.core.errors import ProbeError
from oldlogits.core.protocols import PolicyVersion, RolloutEngine, Sampling

PROBE_TOKENS: Final = 128
"""Tokens of the probe prompt, at most."""

EXACT: Final = 1e-4
"""Nats: what two fp32 forwards of the same weights may differ by on any token; measured in docs/metrics.md."""

DYNAMIC: Final = 0.1
"""Nats, mean: what activations rounded to the neighbouring e4m3 code explain; measured in docs/metrics.md."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AllowedError:
    """By how many nats the log-probs of an engine that holds the right weights may differ: any token, or their mean."""

    statistic: Literal["max", "mean"]
    nats: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeResult:
    """Absolute log-prob differences on the probe tokens, in nats."""

    max_abs_error: float
    mean_abs_error: float
    num_tokens: int

    def within(self, allowed: AllowedError) -> bool:
        """Whether the error is as small as that; a NaN never is."""
        return (self.max_abs_error if allowed.statistic == "max" else self.mean_abs_error) <= allowed.nats


def allowed_error(numerics: str, tolerance: float) -> AllowedError:
    """The error that the probe allows.

    Args:
        numerics: The engine's.
        tolerance: Largest mean |difference| in nats; -1: as known of the numerics.
    """
    if tolerance >= 0:
        return AllowedError(statistic="mean", nats=tolerance)
    if numerics == "fp8_dynamic":
        return AllowedError(statistic="mean", nats=DYNAMIC)
    return AllowedError(statistic="max", nats=EXACT)


async def probe(
    engine: RolloutEngine,
    probe_ids: Sequence[int],
    expected: NDArray[np.float32],
    *,
    version: PolicyVersion,
    allowed: AllowedError,
) -> ProbeResult:
    """Compare the engine's log-probs of the probe tokens with those that `version` must give them.

    Args:
        engine: Holds `version`.
        probe_ids: The fixed prompt.
        expected: float32 [len(probe_ids) - 1]: the trainer's, with the engine's numerics, at publish.
        version: The version that the engine should hold.
        allowed: From `allowed_error`.

    Raises:
        ProbeError: They differ by more, or the engine sampled with another version.
    """
    sampling = Sampling(max_tokens=1, prompt_logprobs=True)
    generation = await engine.generate(probe_ids, sampling, f"probe/{version}")
    difference = np.abs(np.asarray(generation.prompt_logprobs, np.float32) - expected)
    result = ProbeResult(
        max_abs_error=float(difference.max()), mean_abs_error=float(difference.mean()), num_tokens=len(difference)
    )
    sampled_with = [span.version for span in generation.spans]
    if sampled_with != [version] or not result.within(allowed):
        raise ProbeError(
            f"the engine does not hold version {version} as the trainer published it",
            got=f"|log-prob difference| max {result.max_abs_error:.2e}, mean {result.mean_abs_error:.2e} "
            f"on {result.num_tokens} tokens, tagged with versions {sampled_with}",
            allowed=f"{allowed.statistic} <= {allowed.nats:.0e} and version {version}",
            fix="check the weight update; if the two engines differ by that much, set engine.probe_tolerance",
        )
    return result
