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
from oldlogits.train.reports import PublishedVersion

PROBE_TOKENS: Final = 128
"""Tokens of the probe prompt, at most."""

EXACT: Final = 1e-4
"""Nats: what two fp32 forwards of the same weights may differ by on any token, where less was measured."""

TIMES_MEASURED: Final = 10.0
"""How many times the largest difference between two packings the largest difference between two fp32 engines may be."""

TIMES_BF16: Final = 4.0
"""How many times the mean difference between bf16 and fp32 arithmetic the mean error of an engine in bf16 may be."""

OF_CHANGED: Final = 0.5
"""How much of what fp8_dynamic changes on average the mean error of an engine may be: docs/metrics.md has both measured."""

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


def allowed_error(
    numerics: str, tolerance: float | Literal["auto"], published: PublishedVersion, *, arithmetic: str = "fp32"
) -> AllowedError:
    """The error that the probe allows an engine of these numerics, which computes in `arithmetic`, with a published version.

    A `tolerance` in nats is the largest mean |difference|. "auto" allows what was measured on the probe with the trainer's own
    model: by default some times the packing noise on any token; of an engine in bf16 some times what bf16 arithmetic changes on
    average; with fp8_dynamic half of what the numerics change on average, since two engines round some activations otherwise.
    """
    noise = published.probe_noise
    if tolerance != "auto":
        return AllowedError(statistic="mean", nats=tolerance)
    if numerics == "fp8_dynamic" or arithmetic == "bf16":
        changed = float(np.abs(published.engine_probe_logps - published.probe_logps).mean())
        dynamic = OF_CHANGED * changed if numerics == "fp8_dynamic" else 0.0
        in_bf16 = TIMES_BF16 * noise.bf16_mean if arithmetic == "bf16" else 0.0
        return AllowedError(statistic="mean", nats=max(EXACT, dynamic + in_bf16))
    return AllowedError(statistic="max", nats=max(EXACT, TIMES_MEASURED * noise.packing_max), routed=published.is_routed)


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
