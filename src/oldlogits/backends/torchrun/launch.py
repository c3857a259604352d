"""Whether torchrun started this process, and as which of its ranks. Imports no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """The place of this process in a launch by torchrun, whose store is at `host` and `port`.

    Args:
        rank: From 0; rank 0 runs the controller, the others follow its trainer.
        attempt: How often torchrun has started the ranks anew.
    """

    rank: int
    num_ranks: int
    host: str
    port: int
    attempt: int


def launched() -> Launch | None:
    """As what torchrun started this process; None where it did not, or there is one rank only."""
    found = os.environ
    if "TORCHELASTIC_RUN_ID" not in found or int(found["WORLD_SIZE"]) == 1:
        return None
    return Launch(
        rank=int(found["RANK"]),
        num_ranks=int(found["WORLD_SIZE"]),
        host=found["MASTER_ADDR"],
        port=int(found["MASTER_PORT"]),
        attempt=int(found["TORCHELASTIC_RESTART_COUNT"]),
    )
