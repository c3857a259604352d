"""What the tests of the study share: a small plan, and jobs that a worker process can import."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from oldlogits.config.schema import RunConfig
from oldlogits.core.errors import ConfigError
from studies.old_logits.declare.plan import Cell

REGIME = {
    "name": "even-2",
    "settings": {"lockstep.max_lag": 2, "max_staleness": 2},
    "band": 1.1,
    "eps_low": 0.2,
    "eps_high": 0.28,
}


def plan_table(**sections: object) -> dict[str, object]:
    """A study of two methods in one regime."""
    return {
        "title": "a small study",
        "base": {"num_updates": 3, "runtime": {"type": "lockstep"}, "eval": {"num_episodes": 0, "every": 1}},
        "regimes": [REGIME],
        "learning": {
            "regimes": ["even-2"],
            "methods": ["exact", "arrival", "mu"],
            "contrasts": [["exact", "arrival"]],
            "num_blocks": 3,
            "num_exploratory_blocks": 2,
            "first_seed": 5,
        },
        **sections,
    }


def cell(seed: int, method: str = "exact") -> Cell:
    return Cell(stage="learning", config=RunConfig(seed=seed), method=method, regime="r")


def job(cell: Cell, folder: Path) -> list[dict[str, object]]:
    """Seed 13 is refused, seed 14 is a defect, seed 15 is killed; where it ran is part of the row."""
    assert not folder.exists()
    match cell.config.seed:
        case 13:
            raise ConfigError("unlucky", got="13", allowed="others", fix="another seed")
        case 14:
            raise ZeroDivisionError("a defect")
        case 15:
            os.kill(os.getpid(), signal.SIGKILL)
    folder.mkdir()
    print("heard in the log")
    return [{"seed": cell.config.seed, "pid": os.getpid(), "folder": str(folder)}]
