"""A run folder of this project: the token tables of its updates, with the bounds of its recipe."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from oldlogits.batch.token_columns import MAX_TOKENS, TokenTable, naming
from oldlogits.config.load import config_from_table, read_toml
from oldlogits.core.errors import TokenTableError, reading
from oldlogits.doctor.tokens import Batch, Settings
from oldlogits.record.folder import RunFolder
from oldlogits.record.tables import SCHEMA

Column = NDArray[np.generic]

_NAMES: Final = {"logp_proximal": "logp_old", "loss_mask": "mask", "active_mask": "kept"}
_INTEGERS: Final = ("index", "token_id", "version", "trainer_version", "staleness")
_READ: Final = (*_INTEGERS, "loss_mask", "active_mask", "logp_mu", "logp_proximal", "logp_theta", "advantage")
_OF_CONTEXT: Final[Mapping[str, float]] = {"i": -1, "f": math.nan, "b": False}
"""What columns hold on context, by kind."""
MOST_TOKENS: Final = 20_000_000
"""Tokens that are read of a run: those of its newest updates."""


def read(path: Path, *, with_context: bool = False) -> Batch:
    """Read the token tables of a run folder, or one of them.

    Args:
        path: The folder, or a table.
        with_context: Whether to read what stands before and between the trained tokens, too, as a forward pass needs it.

    Raises:
        TokenTableError: There is none, or one is damaged.
    """
    folder = RunFolder(path=path if path.is_dir() else path.parent.parent)
    tables = sorted(folder.tokens.glob("v*.parquet")) if path.is_dir() else [path]
    if not tables:
        raise TokenTableError(
            f"{path} holds no token tables", got="no tokens/v*.parquet", allowed="a run with record.tokens_every above 0",
            fix="run again with record.tokens_every = 1",
        )  # fmt: skip
    parts: list[dict[str, Column]] = []
    names: list[str] = []
    num = 0
    for table in reversed(tables):
        num += _num_tokens(table, with_context)
        if parts and num > MOST_TOKENS:
            break
        part, own = _part(table, len(names), with_context)
        parts.append(part)
        names += own
    columns = {name: np.concatenate([part[name] for part in reversed(parts)]) for name in parts[0]}
    staleness = columns.pop("staleness")
    wrong = columns["mask"] & (columns["version"] >= 0) & (staleness != columns["trainer_version"] - columns["version"])
    said = f"the recorded staleness of {wrong.sum():,} tokens is not the trainer's version less theirs"
    skipped = f"the newest {len(parts)} of {len(tables)} token tables were read"
    numbers = {name: ~columns["mask"] for name, column in columns.items() if column.dtype.kind == "f"}
    with naming(path):
        made = TokenTable.of(columns, numbers if with_context else None, {"trajectory": names})
    return Batch(
        source=path.name,
        framework="oldlogits",
        table=made,
        notes=(skipped,) if len(parts) < len(tables) else (),
        contradictions=(said,) if wrong.any() else (),
        settings=_settings(folder),
    )


def _reading(path: Path) -> AbstractContextManager[None]:
    allowed, fix = "the tables that oldlogits train writes", "remove the file, or name another run"
    return reading(TokenTableError, f"{path} is no token table of a run", got=path.name, allowed=allowed, fix=fix)


def _num_tokens(path: Path, with_context: bool) -> int:
    """The tokens that a table claims to hold, before they are read: few bytes may claim any number of them.

    Raises:
        TokenTableError: There are more than a file may hold, or it is damaged.
    """
    with _reading(path):
        held = pq.read_metadata(path)
        groups = [held.row_group(number) for number in range(held.num_row_groups)]
        columns = [group.column(number) for group in groups for number in range(group.num_columns)]
        context = [column.num_values for column in columns if column.path_in_schema.startswith("context.")]
        num: int = held.num_rows + with_context * sum(context)
        if num > MAX_TOKENS:
            raise ValueError(f"{num} tokens, above {MAX_TOKENS}")
    return num


def _part(path: Path, first: int, with_context: bool) -> tuple[dict[str, Column], list[str]]:
    """The columns of one update, its trajectories numbered from `first`, and their names."""
    with _reading(path):
        there = pq.read_schema(path).names
        names = [*_READ, *(["temperature"] if "temperature" in there else [])]
        with_context = with_context and "context" in there
        found = pq.read_table(path, columns=["trajectory", *names, *(["context"] if with_context else [])])
        for name in names:
            if found.column(name).type != SCHEMA.field(name).type or found.column(name).null_count:
                raise ValueError(f"column {name} has missing values, or is of another type: {found.column(name).type}")
        encoded = found.column("trajectory").cast("string").combine_chunks().dictionary_encode()
        part = {_NAMES.get(name, name): found.column(name).to_numpy() for name in names}
        part["trajectory"] = encoded.indices.to_numpy() + first
        if with_context:
            lists = found.column("context").combine_chunks()
            part = _with_context(part, lists.flatten().to_numpy(), lists.value_lengths().to_numpy().astype(np.int64))
        return part, [f"{path.stem}/{name}" for name in encoded.dictionary.to_pylist()]


def _with_context(part: dict[str, Column], context: Column, lengths: NDArray[np.int64]) -> dict[str, Column]:
    """Put before each trained token the context that was read since the one before it: `lengths` counts it."""
    rows = np.repeat(np.arange(len(lengths)), lengths + 1)
    place = np.cumsum(lengths + 1) - 1
    is_context = np.ones(len(rows), np.bool_)
    is_context[place] = False
    made = {name: column[rows] for name, column in part.items()}
    made["token_id"][is_context] = context
    made["index"] = made["index"].astype(np.int64) - (place[rows] - np.arange(len(rows)))
    for name in made.keys() - {"trajectory", "index", "token_id"}:
        made[name][is_context] = _OF_CONTEXT[made[name].dtype.kind]
    return made


def _settings(folder: RunFolder) -> Settings | None:
    """The bounds of the run's recipe; None: it cannot be read."""
    if not folder.config.is_file():
        return None
    with reading(
        TokenTableError, f"{folder.config} cannot be read", got=folder.config.name, allowed="a recipe", fix="restore it"
    ):
        config = config_from_table(read_toml(folder.config))
    objective = config.objective
    return Settings(
        eps_low=objective.eps_low,
        eps_high=objective.eps_high,
        dual_clip=objective.dual_clip if objective.dual_clip is not None else math.inf,
        band=config.fixed_band,
        stated=objective.clip == "ppo",
    )
