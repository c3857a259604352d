"""From the files that a user names to batches: which reader a file is for is seen from what it holds."""

from __future__ import annotations

import stat
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, cast

from oldlogits.batch.token_table import read_token_table
from oldlogits.core.errors import TokenTableError, printable, reading
from oldlogits.doctor.readers import areal, prime_rl, run_folder, skyrl, slime
from oldlogits.doctor.tokens import Batch

_FIRST: Final = 1 << 20
"""Bytes that are looked at to see what a file of JSON lines is."""

KINDS: Final = (
    "a neutral token table (docs/token-table.md), a run folder or one of its token tables, token exports of prime-rl, "
    ".pt of slime, miles or AReaL, .jsonl of AReaL, .pkl of SkyRL"
)


def read_batches(paths: Sequence[Path], *, trust: bool = False, with_context: bool = False) -> list[Batch]:
    """Read every file; a folder of prime-rl's exports is a batch for each of its files.

    Args:
        paths: Files and folders.
        trust: Whether to unpickle files that need it.
        with_context: Whether to read the context in run folders, too, which only recomputing needs; other files have it or not.

    Raises:
        TokenTableError: A file is absent, of no kind that is known, damaged, or would have to be unpickled without `trust`.
    """
    found = (batch for path in paths for batch in _read(path, trust, with_context))
    return [replace(batch, source=printable(batch.source).replace("\n", "\\n")) for batch in found]


def _read(path: Path, trust: bool, with_context: bool) -> list[Batch]:
    with reading(TokenTableError, f"{path} cannot be read", got=path.name, allowed=KINDS, fix="name another file"):
        is_folder = stat.S_ISDIR(path.stat().st_mode)
        first = b"" if is_folder else _begin(path)
    if is_folder:
        if (path / "tokens").is_dir() or (path / "events.jsonl").is_file():
            return [run_folder.read(path, with_context=with_context)]
        exports = sorted(path.rglob("rank_*.jsonl"))
        if not exports:
            raise _unknown(path, "a folder")
        return [prime_rl.read(export) for export in exports]
    if path.suffix == ".pt":
        from oldlogits.doctor.readers.pickled import load_torch

        content = load_torch(path, trust=trust)
        if slime.is_dump(content):
            return [slime.read(path, cast(dict[str, object], content))]
        if areal.is_batch(content):
            return [areal.read(path, cast(list[dict[str, object]], content))]
        raise _unknown(path, f"a {type(content).__name__}")
    if path.suffix == ".pkl":
        from oldlogits.doctor.readers.pickled import unpickle

        content = unpickle(path, trust=trust)
        if not skyrl.is_dump(content):
            raise _unknown(path, f"a {type(content).__name__}")
        return [skyrl.read(path, cast(dict[str, object], content))]
    if path.suffix == ".jsonl":
        line = first.partition(b"\n")[0]
        if areal.is_trajectories(line):
            return [areal.read_trajectories(path)]
        if prime_rl.is_export(line):
            return [prime_rl.read(path)]
    elif _is_of_run(path):
        return [run_folder.read(path, with_context=with_context)]
    return [Batch(source=path.name, framework="", table=read_token_table(path))]


def _begin(path: Path) -> bytes:
    """The first bytes of a file; what is none, such as a pipe, may never end.

    Raises:
        ValueError: It is no regular file.
    """
    if not path.is_file():
        raise ValueError("no regular file")
    with path.open("rb") as file:
        return file.read(_FIRST)


def _is_of_run(path: Path) -> bool:
    """Whether a Parquet file is a token table of a run, which has columns that a neutral one has not."""
    import pyarrow.parquet as pq

    with reading(TokenTableError, f"{path} is no token table", got=path.name, allowed=KINDS, fix="name another file"):
        return "logp_proximal" in pq.read_schema(path).names


def _unknown(path: Path, got: str) -> TokenTableError:
    return TokenTableError(f"the doctor cannot read {path}", got=got, allowed=KINDS, fix="write a neutral token table")
