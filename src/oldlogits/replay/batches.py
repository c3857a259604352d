"""A recorded batch, and the optimizer steps that share it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from oldlogits.batch.collate import TokenBatch
from oldlogits.core.errors import ReplayError


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedBatch:
    """What one update trained.

    Args:
        name: The file that it was read from, for errors.
        batch: Its tokens; the versions are those of the record.
        groups: The name of each trajectory's group, one per sequence.
        version: The trainer's version when it was trained.
        columns: Recorded values ``[loss token]`` by their names in the token tables of a run; of a neutral table those it has.
    """

    name: str
    batch: TokenBatch
    groups: tuple[str, ...]
    version: int
    columns: Mapping[str, NDArray[np.generic]]

    @property
    def oldest(self) -> int:
        """The version of its oldest token."""
        return self.batch.versions[0]

    def in_steps(self, num_steps: int) -> Self:
        """Deal the groups to another number of optimizer steps, as `batch.collate.collate` does.

        Example:
            Trajectories of the groups "a", "a", "b", "c" in 2 steps: 0, 0, 1, 0.
        """
        numbers: dict[str, int] = {}
        step = np.array([numbers.setdefault(group, len(numbers)) % num_steps for group in self.groups], np.int64)
        return replace(self, batch=replace(self.batch, step=step))


def check_vocabulary(recorded: RecordedBatch, vocab_size: int) -> None:
    """Refuse tokens that a model does not have.

    Raises:
        ReplayError: A token id is out of range.
    """
    ids = recorded.batch.token_ids
    if int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
        raise ReplayError(
            "the record holds tokens that the model does not have",
            got=f"{recorded.name}: token ids {int(ids.min())} .. {int(ids.max())}",
            allowed=f"0 .. {vocab_size - 1}, the vocabulary of the model",
            fix="pass the model that the tokens were recorded with: --model.path FOLDER",
        )
