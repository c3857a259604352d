"""``oldlogits replay RUN_OR_TABLE``: train again from recorded batches."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from oldlogits.cli.main import FAILED
from oldlogits.cli.table import wrapped
from oldlogits.core.errors import ConfigError
from oldlogits.record.folder import RunFolder


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayOptions:
    """Train again from the batches of RECORD, without sampling: a run folder, a token table, or a dump (docs/replay.md).

    Any recipe key that says how to train is overridden by its dotted name, for example `--variant decoupled_async --band 1.2`;
    what changes is then shown beside the recorded recipe. `--num-updates N` ends early. Without overrides a run is repeated bit
    for bit, or the exit status is 1. A table or a dump needs --model.path.
    """

    out: Path | None = None
    """A folder for replay.json, replay.md and the tokens; absent or empty. Default: runs/replay-RECORD-DATE-TIME."""
    start_at: int = 0
    """The version to start at: 0, or that of a checkpoint of the run."""
    trust: bool = False
    """Unpickle a dump that needs it; unpickling runs whatever code a file names."""


def command(arguments: Sequence[str]) -> int:
    """Check, train again, and say what came out."""
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        fix = "oldlogits replay runs/desk --band 1.2"
        raise ConfigError(
            "the first word names no record", got=" ".join(arguments[:1]), allowed="a run folder or a token table", fix=fix
        )
    named = Path(arguments[0])
    words = list(arguments[not arguments[0].startswith("-") :])
    options, overrides = tyro.cli(ReplayOptions, prog="oldlogits replay RECORD", args=words, return_unknown_args=True)
    is_run = RunFolder(path=named).config.is_file()
    if not is_run and not named.is_file():
        raise ConfigError(
            "there is nothing to replay",
            got=f"{named}: " + ("a folder without config.toml" if named.is_dir() else "nothing there"),
            allowed="a run folder, a token table (.parquet, .jsonl), or a dump that `oldlogits doctor` reads",
            fix="pass the folder that was given as --out to oldlogits train",
        )
    if RunFolder(path=named.absolute().parent.parent).config.is_file():
        raise ConfigError(
            "one file of a run does not say what the run began with",
            got=str(named),
            allowed="the run folder itself",
            fix=f"oldlogits replay {named.parent.parent} --num-updates N",
        )
    if options.start_at and not is_run:
        raise ConfigError(
            "only a run has checkpoints to start at",
            got=f"--start-at {options.start_at}, and {named}, which is no run folder",
            allowed="a table from its first update on",
            fix="remove --start-at; --model.path names the weights that the table begins with",
        )
    out = options.out or Path("runs") / f"replay-{named.stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    RunFolder(path=out).check_free(resume=False)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    from oldlogits.doctor.readers.door import read_batches
    from oldlogits.replay.replay import open_run, open_table, replay
    from oldlogits.replay.summary import header, row

    def note(text: str) -> None:
        print(text, flush=True)

    if is_run:
        record = open_run(named, overrides, start_at=options.start_at, note=note)
    else:
        [dump] = read_batches([named], trust=options.trust)
        record = open_table(dump.table, named, overrides, note=note)
    print(f"replay of {named} into {out}\n")
    print(header(has_other=bool(record.recipes.changes)))
    summary = asyncio.run(replay(record, lambda one: print(row(one), flush=True), out / "tokens"))
    summary.write(out)
    print("", *("\n".join(wrapped(sentence)) for sentence in summary.sentences()), sep="\n")
    return FAILED if is_run and not summary.changes and not summary.is_same else 0
