"""What the tests of replays share: one small recorded run, and its replays."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from oldlogits.cli.main import run as command
from oldlogits.run.run import run

from ..runs import recipe


def recorded(folder: Path, out: Path, **sections: object) -> Path:
    """Run a small recipe that keeps every checkpoint."""
    config = recipe(folder, **sections)
    config = replace(config, record=replace(config.record, checkpoint_every=2, keep_every=1))
    assert run(config, out).summary.ended == "done"
    return out


def replayed(record: Path, out: Path, *words: str) -> dict:
    assert command(["replay", str(record), "--out", str(out), *words]) == 0
    return json.loads((out / "replay.json").read_text())
