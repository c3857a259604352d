"""What came of trials, and the files that keep it: a line of JSON for each trial, appended when its run is over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import TypeAdapter

from benchmarks.kills.ledger import Loss
from benchmarks.kills.trials import Plan, Trial


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What came of a trial.

    Args:
        run: The number of its run in the plan.
        came: What became of the run: "went on", "resumed", "began again" (there was no checkpoint), or "missed" (it was
            over before).
        seconds_s: From the start of the life that was struck to its end.
    """

    run: int
    trial: Trial
    came: str
    wrong: tuple[str, ...]
    seconds_s: float
    loss: Loss = field(default_factory=Loss)


_LINE = TypeAdapter(Result)


def append(path: Path, results: Sequence[Result]) -> None:
    """Keep the trials of a run that is over."""
    with path.open("a+b") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)  # a last line that is not whole
        file.write(b"".join(_LINE.dump_json(result) + b"\n" for result in results))


def read(path: Path) -> list[Result]:
    """Read the trials of a file; a last line that is not whole, which a kill leaves, is left out."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [_LINE.validate_json(line) for line in lines if line.endswith(b"\n")]


def missing(planned: Sequence[Plan], found: Sequence[Result]) -> list[int]:
    """The numbers of the runs of a plan that are still to be played.

    Raises:
        ValueError: What was found belongs to another plan.
    """
    played: dict[int, list[Trial]] = {}
    for result in found:
        played.setdefault(result.run, []).append(result.trial)
    for run, trials in played.items():
        if run < len(planned) and planned[run].trials[: len(trials)] != tuple(trials)[: len(planned[run].trials)]:
            raise ValueError(f"run {run} of the file had other trials: give the same seed, kinds and moments, or another --out")
    return [run for run in range(len(planned)) if run not in played]
