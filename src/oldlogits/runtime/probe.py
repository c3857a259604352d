"""After each weight update: do engine and trainer agree on a fixed prompt, up to the engine's known numerics?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import numpy as np
from numpy.typing import NDArray

from oldlogits.core.errors import ProbeError
from oldlogits.core.protocols import PolicyVersion, RolloutEngine, Sampling

PROBE_TOKENS: Final = 128
"""Tokens of the probe prompt, at most."""

KNOWN_NUMERICS: Final[Mapping[str, float]] = MappingProxyType(
    {"fp32": 1e-4, "bf16": 0.1, "int8": 0.1, "fp8": 0.5, "fp8_dynamic": 0.6, "int4": 2.0}
)
"""Largest mean |log-prob difference| in nats that the numerics alone explain; measured in docs/metrics.md."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeResult:
    """Absolute log-prob differences on the probe tokens, in nats."""

    max_abs_error: float
    mean_abs_error: float
    num_tokens: int


async def probe(
    engine: RolloutEngine,
    probe_ids: Sequence[int],
    expected: NDArray[np.float32],
    *,
    version: PolicyVersion,
    tolerance: float,
) -> ProbeResult:
    """Compare the engine's log-probs of the probe tokens with the trainer's at `version`.

    Args:
        engine: Holds `version`.
        probe_ids: The fixed prompt.
        expected: float32 [len(probe_ids) - 1]: the trainer's live weights, at publish.
        version: The version that the engine should hold.
        tolerance: Largest mean |difference| in nats.

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
    if sampled_with != [version] or not result.mean_abs_error <= tolerance:
        raise ProbeError(
            f"the engine does not hold version {version} as the trainer published it",
            got=f"mean |log-prob difference| {result.mean_abs_error:.2e} on {result.num_tokens} tokens, "
            f"tagged with versions {sampled_with}",
            allowed=f"<= {tolerance:.0e} and version {version}",
            fix="check the weight update; if the engine's numerics are that coarse, set engine.probe_tolerance",
        )
    return result
