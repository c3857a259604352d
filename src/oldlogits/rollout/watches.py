"""What may go wrong for a while and not for ever: episodes that fail, groups that are left out. Warned of, then stopped."""

from __future__ import annotations

from collections import deque
from typing import Final

from oldlogits.core.errors import RolloutError
from oldlogits.core.weights import PolicyVersion
from oldlogits.record.bus import EventSink
from oldlogits.record.events import Warned
from oldlogits.rollout.buffer import AdmittedGroup
from oldlogits.rollout.turns import Failure

WINDOW: Final = 256
"""Episodes over which the share of failures is taken, the last ones."""
FEWEST: Final = 64
"""Episodes that a warning counts as if they had ended: a few failures at the start are no share."""
WARN_SHARE: Final = 0.05
"""The share of failed episodes above which is warned."""


class FailureWatch:
    """Counts how many of the last episodes their environments ended.

    Args:
        events: Is warned once.
        what: The episodes in words, such as "training episodes".
        max_share: The share of `WINDOW` episodes that may fail; counted from the first one on, so that a start with a few
            failures ends nothing.
        remedy: What to do about it.
    """

    def __init__(self, events: EventSink, what: str, max_share: float, remedy: str = "") -> None:
        self._events, self._what, self._max_share, self._remedy = events, what, max_share, remedy
        self._last: deque[bool] = deque(maxlen=WINDOW)
        self._is_warned = False

    @property
    def share(self) -> float:
        """Failed episodes among the last ones."""
        return sum(self._last) / max(len(self._last), 1)

    def count(self, failure: Failure | None, version: PolicyVersion) -> None:
        """Count an episode that ended; None: it ended well.

        Raises:
            RolloutError: Too many have failed.
        """
        self._last.append(failure is not None)
        if failure is None:
            return
        num, ended = sum(self._last), len(self._last)
        said = f"{num} of the last {ended} {self._what} were ended by their environment"
        if num > self._max_share * WINDOW:
            raise RolloutError(
                said,
                got=f"the last: {failure.reason}",
                allowed=f"at most {self._max_share:.0%} of {WINDOW} (rollout.max_failed_share)",
                fix=", or ".join(filter(None, [self._remedy, "raise rollout.max_failed_share"])),
            )
        if num > WARN_SHARE * max(ended, FEWEST) and not self._is_warned:
            self._is_warned = True
            message = f"{said}, which is above {WARN_SHARE:.0%}; the last: {failure.reason}"
            figures = {"failed": num, "ended": ended}
            self._events.emit(Warned(version=version, name="failed-episodes", message=message, figures=figures))


class FilterWatch:
    """Counts the groups that are left out between two updates.

    Args:
        events: Is warned once between two updates.
        prompts_per_update: Groups of a batch.
        max_batches: Groups left out without an update, in batches, at which the run ends; warned of at an eighth of them.
    """

    def __init__(self, events: EventSink, prompts_per_update: int, max_batches: int) -> None:
        self._events, self._per_update = events, prompts_per_update
        self._max = max_batches * prompts_per_update
        self._num_uniform = self._num_small = self._num_kept = 0

    def batch_taken(self) -> None:
        """Begin to count anew: there is something to train."""
        self._num_uniform = self._num_small = self._num_kept = 0

    def count(self, closed: AdmittedGroup, version: PolicyVersion) -> None:
        """Count a group that was closed.

        Raises:
            RolloutError: Too many were left out.
        """
        self._num_kept += not closed.left_out
        self._num_uniform += closed.left_out == "uniform"
        self._num_small += closed.left_out == "small"
        if not closed.left_out:
            return
        num = self._num_uniform + self._num_small
        said = (
            f"since the last update {num} of {num + self._num_kept} groups were left out: {self._num_uniform} with equal "
            f"rewards, {self._num_small} with too many failed episodes"
        )
        if num >= self._max:
            mend = "correct what plays the episodes: trajectory_failed in events.jsonl has the reasons"
            vary = "rows that the model sometimes solves and sometimes does not, a finer reward, or a larger rollout.group_size"
            raise RolloutError(
                said,
                got=f"{self._num_kept} groups to train; a batch takes {self._per_update}",
                allowed=f"fewer than {self._max} (rollout.max_filtered_batches x rollout.prompts_per_update)",
                fix=mend if self._num_small > self._num_uniform else f"{vary}; or rollout.filter_uniform = false",
            )
        if num == max(self._max // 8, 1):
            figures = {"uniform": self._num_uniform, "failed": self._num_small, "kept": self._num_kept}
            message = f"{said}; the run stops at {self._max}"
            self._events.emit(Warned(version=version, name="filtered-groups", message=message, figures=figures))
