"""After each weight update: does the engine give a fixed prompt what the trainer says its weights must give it?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from oldlogits.core.engine import RolloutEngine, Sampling
from oldlogits.core.errors import ProbeError
from oldlogits.core.weights import PolicyVersion
from oldlogits.train.consistency import judged_error, num_excused

PROBE_TOKENS: Final = 128
"""Tokens of the probe prompt, at most."""

EXACT: Final = 1e-4
"""Nats: what two fp32 forwards of the same weights may differ by on any token; measured in docs/metrics.md."""

DYNAMIC: Final = 0.1
"""Nats, mean: what activations rounded to the neighbouring e4m3 code explain; measured in docs/metrics.md."""

COMPUTED_IN_BF16: Final = 0.1
"""Nats, mean: what an engine that computes in bf16, where the trainer computes in fp32, explains."""

_TOO_MUCH: Final = 1.0
"""Nats, mean: more than any numerics explain."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AllowedError:
    """By how many nats the log-probs of an engine that holds the right weights may differ.

    Args:
        statistic: What is held against `nats`: the largest difference of a token, or their mean.
        nats: The bound.
        routed: The model chooses experts: a tie between two may move some tokens further, where any token is judged.
    """

    statistic: Literal["max", "mean"]
    nats: float
    routed: bool = False

    def judge(self, errors: NDArray[np.float32]) -> bool:
        """Whether errors are as small as that, in nats [token] of one sequence; a NaN never is."""
        if self.statistic == "mean":
            return bool(errors.mean() <= self.nats)
        excused = num_excused(np.zeros(len(errors), np.int64), routed=self.routed)
        return judged_error(errors, excused) <= self.nats


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeResult:
    """Absolute log-prob differences on the probe tokens, in nats, and how many of them are above the allowed one."""

    max_abs_error: float
    mean_abs_error: float
    num_tokens: int
    num_above: int


def allowed_error(numerics: str, tolerance: float | Literal["auto"], *, routed: bool, arithmetic: str = "fp32") -> AllowedError:
    """The error that the probe allows an engine of these numerics, which computes in `arithmetic`.

    A `tolerance` in nats is the largest mean |difference|; "auto" allows what is known of the numerics.
    """
    if tolerance != "auto":
        return AllowedError(statistic="mean", nats=tolerance)
    if numerics == "fp8_dynamic":
        return AllowedError(statistic="mean", nats=DYNAMIC)
    if arithmetic == "bf16":
        return AllowedError(statistic="mean", nats=COMPUTED_IN_BF16)
    return AllowedError(statistic="max", nats=EXACT, routed=routed)


async def probe(
    engine: RolloutEngine,
    probe_ids: Sequence[int],
    expected: NDArray[np.float32],
    *,
    version: PolicyVersion,
    allowed: AllowedError,
) -> ProbeResult:
    """Compare the engine's log-probs of the probe tokens with those that the published `version` must give them.

    `expected`, float32 [len(probe_ids) - 1], are the trainer's log-probs with the engine's numerics at publish.

    Raises:
        ProbeError: They differ by more, or the engine sampled with another version.
    """
    sampling = Sampling(max_tokens=1, prompt_logprobs=True)
    generation = await engine.generate(probe_ids, sampling, f"probe/{version}")
    difference = np.abs(np.asarray(generation.prompt_logprobs, np.float32) - expected)
    result = ProbeResult(
        max_abs_error=float(difference.max()),
        mean_abs_error=float(difference.mean()),
        num_tokens=len(difference),
        num_above=int((~(difference <= allowed.nats)).sum()),
    )
    sampled_with = [span.version for span in generation.spans]
    if sampled_with != [version] or not allowed.judge(difference):
        raise ProbeError(
            f"the engine does not hold version {version} as the trainer published it",
            got=f"|log-prob difference| max {result.max_abs_error:.2e}, mean {result.mean_abs_error:.2e} "
            f"on {result.num_tokens} tokens, tagged with versions {sampled_with}",
            allowed=f"{allowed.statistic} <= {allowed.nats:.0e} and version {version}",
            fix=_remedy(result, sampled_with == [version]),
        )
    return result


def _remedy(result: ProbeResult, right_version: bool) -> str:
    """What can help: a tolerance where the two differ by what rounding can do, and nowhere else."""
    if not math.isfinite(result.mean_abs_error):
        return "look for NaN or infinity in the model folder; later in a run, lower trainer.lr"
    if right_version and result.mean_abs_error < _TOO_MUCH:
        return "check the weight update; if the two engines differ by that much, set engine.probe_tolerance"
    return "no tolerance helps: check that engine and trainer read the same, undamaged model, and how weights are updated"
