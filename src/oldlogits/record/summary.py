"""The summary of a run, and the intervals in it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import NormalDist, fmean, stdev
from typing import Any, Final, Literal, Self

from oldlogits.record.folder import write_atomic
from oldlogits.record.jsonl import RecordError, encode

Z_95: Final = NormalDist().inv_cdf(0.975)
"""Half the width of a 95% normal interval, in standard errors: 1.95996."""

Ended = Literal["done", "interrupted", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A mean over episodes with its 95% interval."""

    mean: float
    low: float
    high: float
    num_episodes: int


def wilson(successes: int, n: int) -> Interval:
    """Wilson's 95% score interval of a success rate ``p = successes / n``.

    ``(p + z^2/2n +- z sqrt(p (1 - p) / n + z^2/4n^2)) / (1 + z^2/n)``, Wilson 1927.

    Raises:
        RecordError: Not ``0 <= successes <= n``, or no episode.

    Example:
        >>> interval = wilson(8, 10)
        >>> round(interval.low, 3), round(interval.high, 3)
        (0.49, 0.943)
    """
    if not 0 <= successes <= n or n == 0:
        raise RecordError(
            "no success rate", got=f"{successes} of {n}", allowed="0 <= successes <= n, n >= 1", fix="count the same episodes"
        )
    p, z2 = successes / n, Z_95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    # At the ends one bound is the rate itself; rounding must not push it past.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return Interval(mean=p, low=low, high=high, num_episodes=n)


def paired_gain(before: Sequence[float], after: Sequence[float]) -> Interval:
    """The mean of ``after - before`` over the same episodes, with the 95% normal interval of paired differences.

    ``mean(d) +- z stdev(d) / sqrt(n)`` with ``n - 1`` in the variance. One pair has no finite interval; pairs that
    all differ by the same amount have one of width 0.

    Raises:
        RecordError: The two lists are empty or of different lengths.

    Example:
        >>> gain = paired_gain([0, 0, 1, 0], [1, 0, 1, 1])
        >>> gain.mean, round(gain.low, 3), round(gain.high, 3)
        (0.5, -0.066, 1.066)
    """
    if len(before) != len(after) or not before:
        raise RecordError(
            "a paired gain needs the same episodes before and after",
            got=f"{len(before)} and {len(after)} rewards",
            allowed="two lists of one length, at least 1",
            fix="evaluate the same rows with the same seeds",
        )
    differences = [b - a for a, b in zip(before, after, strict=True)]
    n, mean = len(differences), fmean(differences)
    half = Z_95 * stdev(differences) / math.sqrt(n) if n > 1 else math.inf
    return Interval(mean=mean, low=mean - half, high=mean + half, num_episodes=n)


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What came out of a run. None: not measured.

    Args:
        success_before: Held-out success of sampled episodes, before the first update.
        success_after: The same after the last.
        greedy_before: Held-out success of greedy decoding, before.
        greedy_after: The same after.
        gain: Paired difference of sampled success, after - before.
        num_updates: Versions made.
        num_trajectories: Trajectories trained on.
        num_multi_version_trajectories: Those whose tokens come from more than one version.
        staleness_mean: Over trained tokens, in versions.
        staleness_max: Over trained tokens.
        provenance: Trained tokens by how their stand-in was obtained.
        witness_publish_max_abs_error: Largest ``|logp_old(store) - logp(live weights)|`` right after a publish.
        witness_lag0_max_abs_error: Largest ``|logp_theta - logp_old|`` of tokens of lag 0 before the first step.
        probe_max_abs_error: Largest ``|logp_mu - logp(live weights in the engine's numerics)|`` on the fixed prompt.
        log_r_d_mean_abs: Mean ``|log r_d|`` over loss tokens.
        log_r_d_max_abs: Largest ``|log r_d|`` over loss tokens.
        rho_mean: Mean over updates of the share of loss tokens left active.
        num_dropped_nonfinite: Tokens dropped for a log-prob that is not finite.
        version_bytes_mean: Bytes that the store keeps for one version beside the resident copy.
        version_share_of_copy: The same / bytes of a full copy of the forward weights.
        version_share_of_average: The same / bytes of one fp32 average of the weights.
        switch_mean_s: Seconds until the scoring module was at a version, checkout included.
        sync_bytes_mean: Bytes that travelled to the engine per version.
        num_patch_syncs: Versions that reached the engine as a patch.
        num_full_syncs: Versions that reached it as a full copy.
        num_refused_patches: Patches that the engine's host could not take; a full copy followed.
        trainer_copies_max: Most copies of what is trained that the trainer kept: the live weights, all that its store holds, an
            average. A dedicated scorer's process has its own.
        engine_copies_max: Most copies on the engine's side: those of its replicas, and those that these load from.
        num_servers_down: Times that a server of the engine failed.
        num_lost_tokens: Tokens that servers had sampled when they failed or left and that did not arrive, by their own
            counts: a lower bound. They are sampled anew.
        train_wall_s: Seconds of the training loop.
        engine_idle_share: Share of it in which the engine had nothing to sample.
        trainer_idle_share: Share of it in which the trainer waited.
        runtime: "lockstep", "local", "ray".
        variant: A name in the table of variants.
        source: The route to the stand-in's log-probs.
        seed: The run's seed.
        ended: Why it ended.
        accounting: Trajectories: submitted, trained, filtered, failed, cancelled, queued, running.
    """

    success_before: Interval | None
    success_after: Interval | None
    greedy_before: Interval | None
    greedy_after: Interval | None
    gain: Interval | None
    num_updates: int
    num_trajectories: int
    num_multi_version_trajectories: int
    staleness_mean: float | None
    staleness_max: int | None
    provenance: Mapping[str, int]
    witness_publish_max_abs_error: float | None
    witness_lag0_max_abs_error: float | None
    probe_max_abs_error: float | None
    log_r_d_mean_abs: float | None
    log_r_d_max_abs: float | None
    rho_mean: float | None
    num_dropped_nonfinite: int
    version_bytes_mean: float | None
    version_share_of_copy: float | None
    version_share_of_average: float | None
    switch_mean_s: float | None
    sync_bytes_mean: float | None
    num_patch_syncs: int
    num_full_syncs: int
    num_refused_patches: int
    trainer_copies_max: float | None
    engine_copies_max: int | None
    num_servers_down: int
    num_lost_tokens: int
    train_wall_s: float
    engine_idle_share: float | None
    trainer_idle_share: float | None
    runtime: str
    variant: str
    source: str
    seed: int
    ended: Ended
    accounting: Mapping[str, int]

    def write(self, path: Path) -> None:
        """Write ``summary.json`` atomically; non-finite numbers become strings."""
        plain = json.loads(encode(asdict(self)))
        write_atomic(path, json.dumps(plain, indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read ``summary.json``.

        Raises:
            RecordError: Its keys are not those of a summary.
        """
        found = json.loads(path.read_text(encoding="utf-8"), object_hook=_revive)
        names = {field.name for field in fields(cls)}
        if not isinstance(found, dict) or found.keys() != names:
            raise RecordError(
                f"{path.name} is no summary",
                got=", ".join(sorted(found)) if isinstance(found, dict) else type(found).__name__,
                allowed=", ".join(sorted(names)),
                fix="read the folder with the version of oldlogits that wrote it",
            )
        return cls(**found)


def _revive(found: dict[str, Any]) -> dict[str, Any] | Interval:
    """Undo `encode`: "inf" back to a number, a table with an interval's keys back to an `Interval`."""
    revived: dict[str, Any] = {key: float(value) if value in ("nan", "inf", "-inf") else value for key, value in found.items()}
    return Interval(**revived) if revived.keys() == {field.name for field in fields(Interval)} else revived
