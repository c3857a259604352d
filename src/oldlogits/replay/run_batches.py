"""The batches of a run folder, from its token tables: ``tokens/v000001.parquet`` is what made version 1."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from oldlogits.batch.collate import TokenBatch
from oldlogits.batch.sequences import Ints
from oldlogits.core.errors import ReplayError, reading
from oldlogits.core.trajectory import episode_of
from oldlogits.record.event_log import history, read_events, typed
from oldlogits.record.events import Updated
from oldlogits.record.folder import RunFolder, unreadable_run, version_name
from oldlogits.record.jsonl import RecordError
from oldlogits.record.tables import SCHEMA
from oldlogits.replay.batches import RecordedBatch

Column = NDArray[np.generic]
T = TypeVar("T", bound=np.generic)

_WHOLE: Final = "a token table of docs/run-folder.md, as it was written"
_RESTORE: Final = "restore the file from a copy, or replay the updates before it with --num-updates"


def table_of(folder: RunFolder, version: int) -> Path:
    """Name the table of the update that made a version."""
    return folder.tokens / f"{version_name(version)}.parquet"


def check_run_tables(folder: RunFolder, first: int, last: int) -> list[int]:
    """Refuse a run folder that lacks a table of the updates from version `first` to version `last`, or columns of it.

    Returns:
        The version of the oldest token of each.

    Raises:
        ReplayError: Tables are missing, are damaged, or hold too little.
    """
    oldest: list[int] = []
    for version in range(first + 1, last + 1):
        path = table_of(folder, version)
        if not path.is_file():
            done = version - first - 1
            raise ReplayError(
                f"the token table of the update that made version {version} is missing",
                got=f"no {path}",
                allowed="the tables of all updates that are replayed: record.tokens_every = 1",
                fix=f"replay those before it with --num-updates {done}" if done else "record the run with that key",
            )
        with reading(ReplayError, "a token table is damaged", got=str(path), allowed=_WHOLE, fix=_RESTORE):
            schema = pq.read_schema(path)
        lacking = [field.name for field in SCHEMA if field.name not in schema.names or schema.field(field.name) != field]
        if lacking:
            raise ReplayError(
                "a token table does not hold all that an update reads",
                got=f"{path}: no column, or one of another type: {', '.join(lacking)}",
                allowed=", ".join(SCHEMA.names),
                fix="record the run again with this version of oldlogits",
            )
        with reading(ReplayError, "a token table is damaged", got=str(path), allowed=_WHOLE, fix=_RESTORE):
            oldest.append(int(pc.min(pq.read_table(path, columns=["version"]).column(0)).as_py()))
    return oldest


def last_update(folder: RunFolder) -> int:
    """Tell the version that the last update of a run has made, on the line of history that counts.

    Raises:
        ReplayError: A line of its events is damaged.
    """
    try:
        with unreadable_run(folder.path):
            made = [event.version for event in typed(history(read_events(folder.events)), Updated)]
    except RecordError as error:
        raise ReplayError(error.what, got=error.got, allowed=error.allowed, fix=error.fix) from error
    return max(made, default=0)


def run_batches(folder: RunFolder, first: int, last: int, num_steps: int) -> Iterator[RecordedBatch]:
    """Read the batches of the updates from version `first` to version `last`, each when it is asked for.

    Args:
        folder: A run folder that `check_run_tables` has passed.
        first: The version that the first batch entered training at.
        last: The version that the last one made.
        num_steps: The optimizer steps of an update.

    Raises:
        ReplayError: A table is damaged.
    """
    for version in range(first, last):
        path = table_of(folder, version + 1)
        with reading(ReplayError, "a token table is damaged", got=str(path), allowed=_WHOLE, fix=_RESTORE):
            table = pq.read_table(path)
            columns = {name: _plain(table.column(name)) for name in SCHEMA.names if name != "context"}
            lists = table.column("context").combine_chunks()
            context, lengths = lists.flatten().to_numpy(), lists.value_lengths().to_numpy()
            if not np.isin(columns["step"], np.arange(num_steps)).all():
                raise ValueError(f"an optimizer step is none of the {num_steps} of an update")
            batch = _batch(columns, context.astype(np.int64), lengths.astype(np.int64), version)
        groups = tuple(episode_of(id).rpartition(".")[0] or id for id in batch.trajectory_ids)  # g000012 of g000012.3#1
        yield RecordedBatch(name=str(path), batch=batch, groups=groups, version=version, columns=columns)


def _batch(columns: Mapping[str, Column], context: Ints, lengths: Ints, version: int) -> TokenBatch:
    """Put context and trained tokens in their places; `lengths` counts the context tokens before each trained one.

    Raises:
        ValueError: The rows contradict each other.
    """
    trajectory, index, sampled_by = columns["trajectory"], *(columns[name].astype(np.int64) for name in ("index", "version"))
    num_rows, num_tokens = len(trajectory), len(trajectory) + len(context)
    begins = np.flatnonzero(np.concatenate([[True], trajectory[1:] != trajectory[:-1]])[:num_rows])
    place = np.arange(num_rows) + np.cumsum(lengths)  # of each trained token in the flat batch
    starts = np.concatenate([place[begins] - lengths[begins], [num_tokens]]).astype(np.int64)
    sequence = np.repeat(np.arange(len(begins)), np.diff(np.append(begins, num_rows)))
    ids = tuple(map(str, trajectory[begins]))

    def spread(name: str, fill: T) -> NDArray[T]:
        values = np.full(num_tokens, fill, fill.dtype)
        values[place] = columns[name]
        return values

    loss_mask, token_ids = spread("loss_mask", np.False_), spread("token_id", np.int64(0))
    each = {name: columns[name][begins] for name in ("advantage", "reward", "step")}
    heat = columns["temperature"].astype(np.float32)
    rules = {
        "there is no row": num_rows > 0,
        "the rows of a trajectory are apart": len(set(ids)) == len(ids),
        "its context does not fill the gaps of its indices": (place - starts[sequence] == index).all(),
        "a trajectory begins with a trained token": (index > 0).all(),
        f"it is not of the update that version {version} began": (columns["trainer_version"] == version).all(),
        "a version is none that the trainer had": ((sampled_by >= 0) & (sampled_by <= version)).all(),
        "a row is not trained": columns["loss_mask"].all(),
        "a temperature is not above 0": ((heat > 0) & np.isfinite(heat)).all(),
        "an advantage or reward is not finite": all(np.isfinite(columns[n]).all() for n in ("advantage", "reward")),
        "advantage, reward or step differ within a trajectory": all((columns[n] == v[sequence]).all() for n, v in each.items()),
    }
    for what, holds in rules.items():
        if not holds:
            raise ValueError(what)
    token_ids[~loss_mask] = context
    return TokenBatch(
        token_ids=token_ids,
        temperature=spread("temperature", np.float32(1)),
        starts=starts,
        loss_mask=loss_mask,
        version=spread("version", np.int64(-1)),
        logp_mu=spread("logp_mu", np.float32(0)),
        mixed_kv=spread("mixed_kv", np.False_),
        advantages=each["advantage"].astype(np.float32),
        rewards=each["reward"].astype(np.float32),
        step=each["step"].astype(np.int64),
        trajectory_ids=ids,
    )


def _plain(column: pa.ChunkedArray) -> Column:
    if column.null_count:
        raise ValueError("a value is missing")
    plain = column.cast(pa.string()) if pa.types.is_dictionary(column.type) else column
    values: Column = plain.to_numpy()
    return values
