"""The order desk with a long horizon: customers have four to six wishes, and one mistake loses the reward."""

from __future__ import annotations

from typing import Literal

from oldlogits.envs.desk import OrderDesk
from oldlogits.envs.desk_data import DeskRow, make_long_row


class LongOrderDesk(OrderDesk):  # noqa: D101
    # Players read the docstring, which is the policy: it is inherited.

    @staticmethod
    def make_row(split: Literal["train", "heldout"], index: int) -> DeskRow:
        """Row `index` of a split."""
        return make_long_row(split, index)
