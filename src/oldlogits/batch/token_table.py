"""Token tables as files, read as what a stranger may have written: Parquet, and JSON lines with one object a token."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.json
import pyarrow.parquet as pq
from numpy.typing import NDArray

from oldlogits.batch.token_columns import (
    COLUMNS,
    COUNTED,
    FLAGS,
    MAX_TOKENS,
    MEASURED,
    NAMES,
    ON_LOSS,
    REQUIRED,
    Bools,
    TokenTable,
    naming,
)
from oldlogits.core.errors import TokenTableError, reading, writing

__all__ = ["TokenTable", "read_token_table", "write_token_table"]

Column = NDArray[np.generic]

_TYPES: Final = {
    **dict.fromkeys(NAMES, pa.large_string()),
    **dict.fromkeys(COUNTED, pa.int64()),
    **dict.fromkeys(MEASURED, pa.float64()),
    **dict.fromkeys(FLAGS, pa.bool_()),
}
_WORDS: Final = {
    **dict.fromkeys(NAMES, "a string that is not empty"),
    **dict.fromkeys(COUNTED, "a whole number from 0"),
    **dict.fromkeys(MEASURED, "a number"),
    **dict.fromkeys(FLAGS, "true or false"),
}
_FIX: Final = "correct what writes the table; docs/token-table.md describes its columns"
_ROWS_A_BLOCK: Final = 1 << 16


def read_token_table(path: str | Path) -> TokenTable:
    """Read a token table, a column at a time: JSON lines if the name ends in ``.jsonl``, or else Parquet.

    docs/token-table.md describes both.

    Raises:
        TokenTableError: The file is absent, damaged or no token table; the error names the file and the row.
    """
    path = Path(path)
    columns: dict[str, Column] = {}
    missing: dict[str, Bools] = {}
    names: dict[str, list[str]] = {}
    allowed = "a whole Parquet file, or JSON lines in a file that ends in .jsonl"
    with reading(TokenTableError, f"{path} is no token table", got=path.name, allowed=allowed, fix=_FIX):
        source = _json_columns(path) if path.suffix == ".jsonl" else _parquet_columns(path)
        for name, column in source:
            if column.null_count == len(column) and name not in (*REQUIRED, *ON_LOSS):
                continue
            if name in NAMES:
                columns[name], names[name] = _names(path, name, column)
            else:
                columns[name], marks = _values(path, name, column)
                if marks is not None:
                    missing[name] = marks
    with naming(path):
        return TokenTable.of(columns, missing, names)


def write_token_table(path: str | Path, table: TokenTable) -> None:
    """Write a token table, as JSON lines if the name ends in ``.jsonl``, or else as Parquet; as a whole or not at all.

    Raises:
        TokenTableError: JSON lines cannot hold a number that is not finite.
        RunWriteError: The file cannot be written.
    """
    arrays: dict[str, pa.Array] = {}
    for name, column in table.columns().items():
        if name in NAMES:
            known = pa.array(table.trajectories if name == "trajectory" else table.groups, pa.string())
            arrays[name] = pa.DictionaryArray.from_arrays(pa.array(column, mask=column < 0), known)  # type: ignore[operator]
        elif name in COUNTED:
            arrays[name] = pa.array(column, mask=column < 0)  # type: ignore[operator]
        else:
            arrays[name] = pa.array(column, mask=table.missing.get(name), from_pandas=False)
    ordered = pa.table({name: arrays[name] for name in COLUMNS if name in arrays})
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial")
    with writing(path):
        if path.suffix == ".jsonl":
            _write_lines(partial, ordered)
        else:
            pq.write_table(ordered, partial, compression="zstd")
        os.replace(partial, path)


def _write_lines(path: Path, table: pa.Table) -> None:
    with path.open("w", encoding="utf-8") as file:
        for batch in table.to_batches(max_chunksize=_ROWS_A_BLOCK):
            try:
                file.writelines(json.dumps(row, allow_nan=False) + "\n" for row in batch.to_pylist())
            except ValueError:
                raise TokenTableError(
                    "JSON lines hold no number that is not finite",
                    got="NaN or an infinity among the columns of numbers",
                    allowed="finite numbers, and null for what is missing",
                    fix="write Parquet: a file name that does not end in .jsonl",
                ) from None


def _parquet_columns(path: Path) -> Iterator[tuple[str, pa.ChunkedArray]]:
    with pq.ParquetFile(path) as file:
        if file.metadata.num_rows > MAX_TOKENS:
            raise TokenTableError(
                f"{path} is too long",
                got=f"{file.metadata.num_rows} tokens",
                allowed=f"at most {MAX_TOKENS}",
                fix="write a file an update, and pass them all",
            )
        schema = file.schema_arrow
        _check_names(path, schema.names)
        for field in schema:
            if not _fits(field):
                raise TokenTableError(
                    f"{path}: column '{field.name}' is of another type",
                    got=str(field.type),
                    allowed=_WORDS[field.name],
                    fix=_FIX,
                )
        for name in schema.names:
            yield name, file.read(columns=[name]).column(0)


def _fits(field: pa.Field) -> bool:
    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    if pa.types.is_null(kind):
        return field.name not in REQUIRED
    if field.name in NAMES:
        return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))
    if field.name in COUNTED:
        return bool(pa.types.is_integer(kind))
    return (
        bool(pa.types.is_boolean(kind))
        if field.name in FLAGS
        else bool(pa.types.is_floating(kind) or pa.types.is_integer(kind))
    )


def _json_columns(path: Path) -> Iterator[tuple[str, pa.ChunkedArray]]:
    options = pyarrow.json.ParseOptions(explicit_schema=pa.schema(_TYPES.items()), unexpected_field_behavior="error")
    try:
        table = pyarrow.json.read_json(path, parse_options=options)
        table.validate(full=True)  # names are UTF-8
    except pa.ArrowInvalid:
        _find_damage(path)
        raise
    _check_names(
        path, [name for name in table.column_names if name in REQUIRED or table[name].null_count < len(table) or not len(table)]
    )
    for name in table.column_names:
        if name in MEASURED:
            numbers = table.column(name).to_numpy()
            wild = ~np.isfinite(numbers) & ~table.column(name).is_null().to_numpy()
            if wild.any():
                raise _damaged(
                    path,
                    row := int(np.argmax(wild)) + 1,
                    f"{name} = {numbers[row - 1]}",
                    f"{name}: a finite number; Parquet can hold others",
                )
        yield name, table.column(name)


def _find_damage(path: Path) -> None:
    """Raise the error of the first line that is no row of a token table, if there is one."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode()
                row = json.loads(text, parse_constant=float, object_pairs_hook=each_once) if text.strip() else {}
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                raise _damaged(
                    path, number, repr(line[:80].decode(errors="replace")), "one JSON object a line, each key once, in UTF-8"
                )
            for name, value in row.items():
                if name not in COLUMNS:
                    raise _damaged(path, number, f"column {name!r}"[:100], f"the columns {', '.join(COLUMNS)}")
                if value is not None and not _is_value(name, value):
                    raise _damaged(path, number, f"{name} = {value!r}"[:100], f"{name}: {_WORDS[name]}")


def each_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Make an object of JSON of its pairs, none of which may stand for another one.

    Raises:
        ValueError: A key stands there twice.
    """
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a key stands there twice")
    return made


def _is_value(name: str, value: object) -> bool:
    if name in FLAGS:
        return isinstance(value, bool)
    if name in NAMES:
        return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)
    whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    return whole or (name in MEASURED and isinstance(value, float) and np.isfinite(value))


def _damaged(path: Path, row: int, got: str, allowed: str) -> TokenTableError:
    return TokenTableError(f"{path}: row {row} is damaged", got=got, allowed=allowed, fix=_FIX)


def _check_names(path: Path, names: list[str]) -> None:
    unknown, twice = sorted(set(names) - set(COLUMNS)), sorted({name for name in names if names.count(name) > 1})
    absent = [name for name in REQUIRED if name not in names]
    if unknown or twice or absent:
        got = (
            [f"unknown: {name}" for name in unknown]
            + [f"twice: {name}" for name in twice]
            + [f"absent: {name}" for name in absent]
        )
        raise TokenTableError(
            f"the columns of {path} are not those of a token table",
            got=", ".join(got)[:300],
            allowed=", ".join(COLUMNS),
            fix=_FIX,
        )


def _first_null(column: pa.ChunkedArray) -> int:
    return int(np.argmax(column.is_null().to_numpy())) + 1


def _names(path: Path, name: str, column: pa.ChunkedArray) -> tuple[Column, list[str]]:
    """The codes of a column of names, in order of first appearance, -1 where missing, and the names."""
    if name == "trajectory" and column.null_count:
        raise _damaged(path, _first_null(column), "trajectory = null", _WORDS[name])
    encoded = column.cast(pa.large_string()).combine_chunks().dictionary_encode()
    codes = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int32)
    known = encoded.dictionary.to_pylist()
    if "" in known:
        raise _damaged(path, int(np.argmax(codes == known.index(""))) + 1, f"{name} = ''", _WORDS[name])
    return codes, known


def _values(path: Path, name: str, column: pa.ChunkedArray) -> tuple[Column, Bools | None]:
    """The values of a column, with what stands for a missing one, and the marks of missing numbers."""
    if column.null_count and (name in REQUIRED or name in FLAGS):
        raise _damaged(path, _first_null(column), f"{name} = null", f"{name}: {_WORDS[name]}")
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if name in FLAGS:
        return column.to_numpy(), None
    if name in MEASURED:
        values = column.cast(pa.float32(), safe=False)
        marks = column.is_null().to_numpy() if column.null_count else None
        return values.to_numpy(), marks
    numbers = column.cast(pa.int64()).fill_null(-1).to_numpy()
    if column.null_count or (len(numbers) and numbers.min() < 0):
        below = (numbers < 0) & ~column.is_null().to_numpy()
        if below.any():
            row = int(np.argmax(below))
            raise _damaged(path, row + 1, f"{name} = {numbers[row]}", f"{name}: {_WORDS[name]}; null where a token has none")
    return numbers, None
