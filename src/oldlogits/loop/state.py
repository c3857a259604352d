"""What a run needs to go on from a checkpoint, besides the trainer's own state."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

FILE: Final = "state/loop.json"
"""Where it lies in a checkpoint."""


@dataclass(slots=True, kw_only=True)
class LoopState:
    """Counts and rows.

    Args:
        num_events: Events recorded when it was written; None: the run begins. Those after them are done anew.
        is_evaluated: Whether the evaluation before the first update is done.
        next_row: The first training row that was never started.
        unfinished_rows: The rows of the groups in flight, which a resumed run starts anew.
        account: Trajectories by what became of them.
    """

    num_updates: int = 0
    num_events: int | None = None
    is_evaluated: bool = False
    next_row: int = 0
    unfinished_rows: list[int] = field(default_factory=list)
    account: dict[str, int] = field(default_factory=dict)

    def write(self, checkpoint: Path) -> None:
        """Write it into the folder of a checkpoint."""
        (checkpoint / FILE).write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, checkpoint: Path) -> LoopState:
        """Read what `write` wrote."""
        return cls(**json.loads((checkpoint / FILE).read_text(encoding="utf-8")))
