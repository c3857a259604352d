"""The neutral token table of docs/token-table.md."""

from __future__ import annotations

from pathlib import Path

from oldlogits.batch.token_table import read_token_table
from oldlogits.doctor.tokens import Batch


def read(path: Path) -> Batch:
    """Read a token table, Parquet or JSON lines."""
    return Batch(source=path.name, framework="", table=read_token_table(path))
