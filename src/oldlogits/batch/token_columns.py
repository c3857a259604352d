"""The neutral token table: the tokens of a batch of any trainer, one row a token, as columns and as a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from oldlogits.core.errors import TokenTableError, printable

Ints = NDArray[np.int32]
Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]

NAMES: Final = ("trajectory", "group")
"""Columns of names; the table holds them as codes."""
COUNTED: Final = ("index", "token_id", "version", "trainer_version", "segment")
"""Columns of whole numbers from 0; missing: -1."""
MEASURED: Final = ("logp_mu", "logp_old", "logp_theta", "advantage", "loss_weight", "temperature")
"""Columns of float32; missing: NaN, and marked in `TokenTable.missing`."""
FLAGS: Final = ("mask", "kept")
"""Columns of truth values; `kept` may be missing as a whole only."""
REQUIRED: Final = ("trajectory", "index", "token_id", "mask")
"""Columns that a file has, with a value in every row."""
ON_LOSS: Final = ("version", "trainer_version", "logp_mu")
"""Columns that a file has; a row without a value is a missing value."""
COLUMNS: Final = (
    *REQUIRED,
    *ON_LOSS,
    "logp_old",
    "logp_theta",
    "advantage",
    "group",
    "segment",
    "loss_weight",
    "temperature",
    "kept",
)
"""The columns of a file, in order."""
MAX_TOKENS: Final = 200_000_000
"""Tokens that a file may hold; a file that claims more is refused before it is read."""
_HIGHEST: Final = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenTable:
    """Tokens as columns ``[token]``, those of a trajectory side by side in ascending `index`.

    A value that was not recorded is missing: -1 in a column of whole numbers, NaN and a mark in `missing` in a column of
    numbers, None for a column without any value. A NaN without a mark was recorded as one.

    Args:
        trajectory: int32; the trajectory of a token, as an index of `trajectories`, in order of first appearance.
        trajectories: The names of the trajectories.
        index: int32; the token's position in its trajectory, context included.
        token_id: int32.
        mask: bool; whether the loss trains the token.
        version: int32; the version of the weights that sampled the token.
        trainer_version: int32; the version that the optimizer step started from that trained the token.
        logp_mu: float32; log-prob of the engine that sampled the token.
        logp_old: float32; log-prob that the trainer took for the old policy's.
        logp_theta: float32; log-prob of the policy that was optimised, at the step that trained the token.
        advantage: float32.
        group: int32; the group of a token's trajectory, as an index of `groups`; -1: none.
        groups: The names of the groups.
        segment: int32; the number, within its trajectory, of the request that sampled the token.
        loss_weight: float32; what the loss multiplied the token's term by: 1 / N where N is its denominator.
        temperature: float32; the temperature that the token was sampled at, and that its log-probs are of.
        kept: bool; whether the token was left after the trainer's own clip and masks.
        missing: Marks of missing values by column of numbers; a column without any is absent.

    Raises:
        TokenTableError: Columns of different lengths or types, values out of range, rows out of order or given twice.
    """

    trajectory: Ints
    trajectories: tuple[str, ...]
    index: Ints
    token_id: Ints
    mask: Bools
    version: Ints
    trainer_version: Ints
    logp_mu: Floats
    logp_old: Floats | None = None
    logp_theta: Floats | None = None
    advantage: Floats | None = None
    group: Ints | None = None
    groups: tuple[str, ...] = ()
    segment: Ints | None = None
    loss_weight: Floats | None = None
    temperature: Floats | None = None
    kept: Bools | None = None
    missing: Mapping[str, Bools] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        """Check the columns."""
        for name, column in self.columns().items():
            _check_column(name, column, len(self.trajectory))
        for name, names in (("trajectory", self.trajectories), ("group", self.groups)):
            codes = getattr(self, name)
            if codes is not None and len(codes) and codes.max() >= len(names):
                raise _refused(
                    f"column '{name}' holds a code without a name", int(codes.argmax()), codes.max(), f"below {len(names)}"
                )
        for name, marks in self.missing.items():
            values = self.columns().get(name) if name in MEASURED else None
            fits = values is not None and marks.dtype == np.bool_ and marks.shape == values.shape
            if not fits or (values is not None and not np.isnan(values[marks].astype(np.float32)).all()):
                raise TokenTableError(
                    f"the marks of missing values of '{name}' do not fit",
                    got=f"{marks.dtype} {marks.shape}",
                    allowed="bool [token], of a column of numbers that is NaN there",
                    fix="write NaN into the column where its value is missing",
                )
        _check_order(self.trajectory, self.index)

    @classmethod
    def of(
        cls,
        columns: Mapping[str, NDArray[np.generic]],
        missing: Mapping[str, Bools] | None = None,
        names: Mapping[str, Sequence[str]] | None = None,
    ) -> Self:
        """Make a table of columns whose rows may stand in any order.

        Args:
            columns: Arrays ``[token]`` by the names of `COLUMNS`; `trajectory` and `group` are strings, or any integers.
            missing: Marks of missing values by column.
            names: What the codes in `trajectory` or `group` stand for, where they are codes.

        Raises:
            TokenTableError: A column is unknown or absent, holds what no token has, or a token is given twice.
        """
        if unknown := sorted(set(columns) - set(COLUMNS)):
            raise TokenTableError(
                "a token table has no such column",
                got=", ".join(unknown),
                allowed=", ".join(COLUMNS),
                fix="rename or leave out the column",
            )
        if absent := [name for name in (*REQUIRED, *ON_LOSS) if name not in columns]:
            raise TokenTableError(
                f"a token table needs a column '{absent[0]}'",
                got=", ".join(columns),
                allowed=", ".join((*REQUIRED, *ON_LOSS)),
                fix=f"write {', '.join(absent)}; null where a token has no such value",
            )
        made, marks = dict(columns), dict(missing or {})
        named = {name: tuple(known) for name, known in (names or {}).items()}
        for name in NAMES:
            if name in made and name not in named:
                made[name], named[name] = encode_names(made[name])
        for name, column in made.items():
            made[name] = _narrowed(name, column)
        trajectory, index = made["trajectory"], made["index"]
        if trajectory.shape == index.shape and not _is_ordered(trajectory, index):
            order = np.lexsort((index, trajectory))
            made = {name: column[order] for name, column in made.items()}
            marks = {name: column[order] for name, column in marks.items()}
            twice = (np.diff(made["trajectory"]) == 0) & (np.diff(made["index"]) == 0)
            if twice.any():
                at = int(np.argmax(twice))
                raise _refused(
                    f"a token is given twice: '{named['trajectory'][made['trajectory'][at]]}', index {made['index'][at]}",
                    int(order[at : at + 2].max()),
                    "the second one",
                    "every (trajectory, index) once; a trajectory of each update has a name of its own",
                )
        return cls(
            **made,  # type: ignore[arg-type]
            trajectories=named["trajectory"],
            groups=named.get("group", ()),
            missing=MappingProxyType(marks),
        )

    def columns(self) -> dict[str, NDArray[np.generic]]:
        """The columns that hold values, by name."""
        present = ((f.name, getattr(self, f.name)) for f in fields(self) if f.name in COLUMNS)
        return {name: column for name, column in present if column is not None}

    @property
    def num_tokens(self) -> int:
        """The number of rows."""
        return len(self.trajectory)

    @property
    def starts(self) -> NDArray[np.int64]:
        """int64 [trajectory + 1]; the rows of trajectory t are ``[starts[t], starts[t + 1])``."""
        return np.searchsorted(self.trajectory, np.arange(len(self.trajectories) + 1)).astype(np.int64)

    def name_of(self, row: int) -> str:
        """What a row is called where a finding shows it: trajectory and position."""
        return printable(f"{self.trajectories[self.trajectory[row]]}[{self.index[row]}]").replace("\n", "\\n")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name the file in the errors of a table that is made of it."""
    try:
        yield
    except TokenTableError as error:
        raise TokenTableError(f"{path}: {error.what}", got=error.got, allowed=error.allowed, fix=error.fix) from None


def encode_names(names: NDArray[np.generic]) -> tuple[Ints, tuple[str, ...]]:
    """Codes in order of first appearance, and the names that they stand for; an empty name is missing: -1."""
    if len(names) == 0:
        return np.zeros(0, np.int32), ()
    change = np.flatnonzero(np.concatenate([[True], names[1:] != names[:-1]]))
    uniques, first, inverse = np.unique(names[change], return_index=True, return_inverse=True)
    rank = np.empty(len(uniques), np.int32)
    kept = uniques != "" if uniques.dtype.kind in "UO" else np.ones(len(uniques), np.bool_)
    order = np.argsort(np.where(kept, first, len(names)), kind="stable")
    rank[order] = np.arange(len(uniques), dtype=np.int32)
    rank[~kept] = -1
    codes = np.repeat(rank[inverse.ravel()], np.diff(np.append(change, len(names))))
    return codes, tuple(str(uniques[i]) for i in order[: int(kept.sum())])


def _check_column(name: str, column: NDArray[np.generic], num_tokens: int) -> None:
    """Refuse a column of another length or type, and values that no token can have."""
    dtype = np.bool_ if name in FLAGS else np.float32 if name in MEASURED else np.int32
    if column.shape != (num_tokens,) or column.dtype != dtype:
        raise TokenTableError(
            f"column '{name}' does not fit the table",
            got=f"{column.dtype} {column.shape}",
            allowed=f"{np.dtype(dtype)} ({num_tokens},)",
            fix="pass one value a token",
        )
    if dtype is not np.bool_:
        _narrowed(name, column)


def _refused(what: str, row: int, got: object, allowed: str) -> TokenTableError:
    return TokenTableError(what, got=f"{got} in row {row + 1}", allowed=allowed, fix="correct what writes the table")


def _narrowed(name: str, column: NDArray[np.generic]) -> NDArray[np.generic]:
    """A column of numbers in the width that a table keeps, if its kind stays and every value is one that a token can have."""
    if name in MEASURED and column.dtype.kind in "fiu":
        if name == "temperature" and (wrong := (column <= 0) | np.isinf(column)).any():  # type: ignore[operator]
            row = int(np.argmax(wrong))
            raise _refused("column 'temperature' holds one that no token is sampled at", row, column[row], "above 0, finite")
        with np.errstate(over="ignore"):
            return column.astype(np.float32, copy=False)
    if name in MEASURED or column.dtype.kind not in "iu":
        return column
    lowest = 0 if name in REQUIRED else -1
    if len(column) and (int(column.max()) > _HIGHEST or int(column.min()) < lowest):
        numbers = column.astype(np.float64)
        row = int(np.argmax((numbers > _HIGHEST) | (numbers < lowest)))
        raise _refused(f"column '{name}' holds a number that no token has", row, column[row], f"{lowest} to {_HIGHEST}")
    return column.astype(np.int32, copy=False)


def _is_ordered(trajectory: NDArray[np.generic], index: NDArray[np.generic]) -> bool:
    """Whether rows ascend by trajectory, and within it by index."""
    step = np.diff(trajectory)
    return bool(np.all((step > 0) | ((step == 0) & (index[1:] > index[:-1]))))  # type: ignore[operator]


def _check_order(trajectory: Ints, index: Ints) -> None:
    """Refuse rows that do not ascend, such as two for one token."""
    if _is_ordered(trajectory, index):
        return
    step = np.diff(trajectory)
    row = int(np.argmax((step < 0) | ((step == 0) & (index[1:] <= index[:-1])))) + 1
    raise TokenTableError(
        "two rows are of one token, or rows are out of order",
        got=f"trajectory {trajectory[row]}, index {index[row]} in row {row + 1} of the ordered rows",
        allowed="every (trajectory, index) once",
        fix="give each trajectory of each update a name of its own",
    )
