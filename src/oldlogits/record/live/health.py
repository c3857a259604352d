"""How a run does, in words: one line from the figures of one update, and how long the rest will take."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from statistics import median
from typing import Final

from oldlogits.record.events import Evaluated, Updated

_WAITS: Final = 0.2
"""Share of an update from which on waiting is told."""
_RECENT: Final = 20
"""Updates whose median length the forecast takes."""


def health_line(update: Updated, *, max_staleness: int | None, num_failed: int, num_ended: int) -> str:
    """Return exactness, staleness beside its bound, who waits for whom, and failed episodes, all of one update.

    Args:
        update: The update.
        max_staleness: The recipe's bound in versions; None where it is not known.
        num_failed: Episodes of training that have failed so far.
        num_ended: Episodes of training that have ended so far.

    Example:
        "old log-probs exact; staleness 3 of at most 4; the trainer waits for samples (56%); no episode failed"
    """
    parts = [*_exactness(update.provenance), *_staleness(update.metrics, max_staleness), *_waiting(update.metrics)]
    parts.append(f"{num_failed} of {num_ended} episodes failed" if num_failed else "no episode failed")
    return "; ".join(parts)


def _exactness(provenance: Mapping[str, int]) -> Iterator[str]:
    total = sum(provenance.values())
    if total:
        exact = provenance.get("exact", 0)
        kinds = ", ".join(sorted(kind for kind, num in provenance.items() if num and kind != "exact"))
        yield "old log-probs exact" if exact == total else f"{exact / total:.0%} of old log-probs exact, others {kinds}"


def _staleness(metrics: Mapping[str, float], bound: int | None) -> Iterator[str]:
    if "staleness/max" in metrics:
        found = metrics["staleness/max"]
        broken = bound is not None and found > bound
        yield f"staleness {found:.0f}" + ("" if bound is None else f" of at most {bound}") + (": BROKEN" if broken else "")


def _waiting(metrics: Mapping[str, float]) -> Iterator[str]:
    engine, trainer = metrics.get("idle/engine_share", 0.0), metrics.get("idle/trainer_share", 0.0)
    if trainer >= max(_WAITS, engine):
        yield f"the trainer waits for samples ({trainer:.0%})"
    elif engine >= _WAITS:
        is_full = metrics.get("queue/queued", 0.0) > metrics.get("queue/running", 0.0)
        behind = is_full or not metrics.get("queue/admission_open", 1.0)
        yield f"the engine waits for {'the trainer' if behind else 'the environments'} ({engine:.0%})"
    elif "idle/engine_share" in metrics:
        yield "engine and trainer are busy"


class Forecast:
    """How long a run will still take: its updates at their recent pace, and the evaluation after them.

    Args:
        total_updates: Updates that the run makes in all.
    """

    def __init__(self, total_updates: int) -> None:
        self._total, self._done = total_updates, 0
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._evaluation_s = 0.0

    def updated(self, update: Updated) -> None:
        """Take in an update."""
        self._done = update.version
        if "time/update_s" in update.metrics:
            self._recent.append(update.metrics["time/update_s"] + update.metrics.get("time/between_s", 0.0))

    def evaluated(self, evaluation: Evaluated) -> None:
        """Take in an evaluation: the one after training takes as long as the one before it."""
        if evaluation.stage == "before":
            self._evaluation_s += evaluation.seconds_s
        elif evaluation.stage == "after":
            self._evaluation_s = max(0.0, self._evaluation_s - evaluation.seconds_s)

    @property
    def left_s(self) -> float | None:
        """Seconds that are left; None: no update has been made."""
        if not self._recent:
            return None
        return max(0, self._total - self._done) * median(self._recent) + self._evaluation_s


def in_minutes(seconds: float | None) -> str:
    """Write a time that is left.

    Example:
        "about 40 s left", "about 3 min left", "about 2.5 h left"
    """
    if seconds is None:
        return ""
    if seconds < 90:
        return f"about {10 * round(seconds / 10 + 0.5):.0f} s left"
    return f"about {seconds / 60:.0f} min left" if seconds < 5400 else f"about {seconds / 3600:.1f} h left"
