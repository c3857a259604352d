"""Per-token tables: one Parquet file an update, one row a trained token."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from oldlogits.core.errors import writing
from oldlogits.record.bus import Event
from oldlogits.record.events import Updated
from oldlogits.record.folder import version_name
from oldlogits.record.jsonl import RecordError

Column = npt.NDArray[np.generic]

_INTEGERS: Final = ("index", "token_id", "version", "trainer_version", "staleness")
_FLOATS: Final = ("reward", "advantage", "logp_mu", "logp_proximal", "logp_theta", "log_r_d", "log_r_s")
_MASKS: Final = ("loss_mask", "band_mask", "clip_mask", "active_mask")
_CONTEXT: Final = "context"

SCHEMA: Final = pa.schema(
    [
        ("trajectory", pa.dictionary(pa.int32(), pa.string())),
        *((name, pa.int32()) for name in _INTEGERS),
        ("provenance", pa.dictionary(pa.int32(), pa.string())),
        *((name, pa.float32()) for name in _FLOATS),
        *((name, pa.bool_()) for name in _MASKS),
        ("step", pa.int32()),
        ("temperature", pa.float32()),
        ("mixed_kv", pa.bool_()),
        (_CONTEXT, pa.list_(pa.int32())),
    ]
)
"""Columns and types. `index` is the token's position in its trajectory, context included; `context` holds the tokens that
were read between the trained token before it and this one, so that a trajectory's rows are all that a forward pass reads."""

_KINDS: Final = {"string": "UTO", "int": "iu", "float": "f", "bool": "b"}


class TokenTables:
    """Writes the tokens of one update in `every` into ``tokens/`` of a run folder; 0: of none."""

    def __init__(self, folder: Path, *, every: int) -> None:
        self._folder, self._every = folder, every

    def emit(self, event: Event) -> None:
        """Write the table that an update brings."""
        if isinstance(event, Updated) and self._every and (event.version - 1) % self._every == 0:
            write_tokens(self._folder, event.version, event.table)


def write_tokens(folder: Path, version: int, columns: Mapping[str, Column]) -> Path:
    """Write the tokens of the update that made `version` to ``folder/v000012.parquet``.

    Args:
        folder: The folder ``tokens/`` of a run folder.
        version: The version that the update made.
        columns: One array ``[token]`` for every column of `SCHEMA`; `context` holds all lists, one behind the other.

    Raises:
        RecordError: A column is missing, unknown, of another length or of another type.
        RunWriteError: The table cannot be written.
    """
    if set(columns) != set(SCHEMA.names):
        raise RecordError(
            "the columns of a token table do not fit its schema",
            got=", ".join(sorted(set(columns) - set(SCHEMA.names))) or "no unknown column",
            allowed=", ".join(SCHEMA.names),
            fix=f"add {', '.join(sorted(set(SCHEMA.names) - set(columns))) or 'none'}; remove unknown columns",
        )
    num_rows = len(columns["index"])
    arrays = [_to_arrow(field, columns[field.name], num_rows) for field in SCHEMA if field.name != _CONTEXT]
    arrays.append(_context_lists(columns))
    path = folder / f"{version_name(version)}.parquet"
    partial = path.with_suffix(".partial")
    with writing(path):
        pq.write_table(pa.Table.from_arrays(arrays, schema=SCHEMA), partial, compression="zstd")
        os.replace(partial, path)
    return path


def sample_tokens(folder: Path, *, names: Sequence[str], max_rows: int) -> dict[str, Column]:
    """Rows of all tables of a folder, thinned uniformly at random to about `max_rows`.

    Args:
        folder: The folder ``tokens/`` of a run folder; it may be absent or empty.
        names: The columns to read.
        max_rows: The expected number of rows; all rows are read when there are fewer.

    Returns:
        One array ``[row]`` a column; of length 0 when there is no table.
    """
    paths = sorted(folder.glob("v*.parquet"))
    num_rows = sum(pq.read_metadata(path).num_rows for path in paths)
    keep_share = min(1.0, max_rows / max(num_rows, 1))
    rng = np.random.default_rng(0)
    parts: list[dict[str, Column]] = []
    for path in paths:
        table = pq.read_table(path, columns=list(names))
        if keep_share < 1.0:
            table = table.take(pa.array(np.flatnonzero(rng.random(table.num_rows) < keep_share)))
        parts.append({name: _to_numpy(table.column(name)) for name in names})
    return {name: np.concatenate([part[name] for part in parts]) if parts else np.empty(0) for name in names}


def _to_arrow(field: pa.Field, column: Column, num_rows: int) -> pa.Array:
    kind = "string" if pa.types.is_dictionary(field.type) else str(field.type).rstrip("0123456789")
    if column.shape != (num_rows,) or column.dtype.kind not in _KINDS[kind]:
        raise RecordError(
            f"column '{field.name}' of a token table does not fit its schema",
            got=f"shape {column.shape}, dtype {column.dtype}",
            allowed=f"shape ({num_rows},), a {kind} dtype",
            fix="pass one value a token",
        )
    if kind == "string":
        return pa.array(column.tolist(), type=pa.string()).dictionary_encode()
    return pa.array(column).cast(field.type, safe=kind != "float")


def _context_lists(columns: Mapping[str, Column]) -> pa.Array:
    """Give each row the context tokens before it: as many as its index is beyond the one that follows the row before."""
    index, trajectory, ids = (columns[name] for name in ("index", "trajectory", _CONTEXT))
    goes_on = np.concatenate([[False], trajectory[1:] == trajectory[:-1]])[: len(index)]
    follows = np.where(goes_on, np.concatenate([[0], index[:-1] + 1])[: len(index)], 0)
    lengths = (index - follows).astype(np.int64)
    if (lengths < 0).any() or ids.shape != (lengths.sum(),) or ids.dtype.kind not in _KINDS["int"]:
        raise RecordError(
            f"column '{_CONTEXT}' of a token table does not fit its indices",
            got=f"{ids.dtype} {ids.shape}; {lengths.sum()} tokens by the indices, {lengths.min(initial=0)} before one",
            allowed="an int dtype, and ascending indices whose gaps the context tokens fill",
            fix="pass the tokens before each trained token, row after row",
        )
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, pa.array(ids).cast(pa.int32()), type=SCHEMA.field(_CONTEXT).type)


def _to_numpy(column: pa.ChunkedArray) -> Column:
    if pa.types.is_dictionary(column.type):
        column = column.cast(pa.string())
    values: Column = column.to_numpy()
    return values
