"""From sequences, as dumps hold them, to a token table: every array is looked at as what a stranger may have written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from oldlogits.batch.token_columns import MAX_TOKENS, TokenTable, naming
from oldlogits.core.errors import TokenTableError, reading

Column = NDArray[np.generic]
Bools = NDArray[np.bool_]
Kind = Literal["whole", "number", "flag"]

_DTYPES: Final[Mapping[Kind, tuple[str, type]]] = {
    "whole": ("iu", np.int64),
    "number": ("fiu", np.float32),
    "flag": ("biuf", np.bool_),
}
_AGAIN: Final = "write the dump anew"
_BLANK: Final[Mapping[str, object]] = {"f": np.nan}


@runtime_checkable
class TensorLike(Protocol):
    """A torch tensor, without an import of torch."""

    @property
    def ndim(self) -> int:
        """The number of dimensions."""

    def numel(self) -> int:
        """The number of values."""

    def detach(self) -> TensorLike:
        """The tensor without a graph."""

    def cpu(self) -> TensorLike:
        """The tensor on the CPU."""

    def float(self) -> TensorLike:
        """The tensor in float32."""

    def is_floating_point(self) -> bool:
        """Whether its values are no integers."""

    def numpy(self) -> Column:
        """The tensor as an array."""

    def __len__(self) -> int:
        """The number of rows."""

    def __getitem__(self, index: int) -> TensorLike:
        """A row."""


def plain(path: Path, where: str, tensor: TensorLike) -> Column:
    """A tensor as an array; bfloat16, which NumPy has not, as float32.

    Raises:
        TokenTableError: It has no array (sparse, quantized, without data), or claims more values than a file may hold tokens:
            one stored value may stand for any number of them.
    """
    allowed = f"a dense tensor of at most {MAX_TOKENS} values"
    with reading(TokenTableError, f"{path}: {where} is damaged", got="a tensor", allowed=allowed, fix=_AGAIN):
        if tensor.numel() > MAX_TOKENS:
            raise ValueError(f"{tensor.numel()} values")
        tensor = tensor.detach().cpu()
        return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


def damaged(path: Path, where: str, got: object, allowed: str) -> TokenTableError:
    """An error of a dump that names the file and the place in it."""
    return TokenTableError(f"{path}: {where} is damaged", got=str(got)[:100], allowed=allowed, fix=_AGAIN)


def array_of(path: Path, where: str, value: object, kind: Kind, length: int | None = None) -> tuple[Column, Bools]:
    """One value a token, and where it is missing, of a list, a tuple, an array or a tensor.

    Raises:
        TokenTableError: It is none, has another length, or holds something else.
    """
    if isinstance(value, TensorLike):
        value = plain(path, where, value)
    allowed = f"{'one' if length is None else length} {kind}s in a row".replace("one ", "")
    if not isinstance(value, list | tuple | np.ndarray):
        raise damaged(path, where, type(value).__name__, allowed)
    try:
        found = np.asarray(value)
    except ValueError:
        raise damaged(path, where, "lists of different lengths", allowed) from None
    missing = np.zeros(found.shape, np.bool_)
    if found.dtype.kind == "O":
        missing = np.asarray(found == np.array(None), np.bool_)
        known = found[~missing].tolist()
        filled = np.asarray(known) if known else np.zeros(0)
        if filled.dtype.kind not in "bifu" or (kind != "number" and missing.any()):
            raise damaged(path, where, f"a {type(next(iter(known), None)).__name__} among its values", allowed)
        found = np.full(found.shape, np.nan)
        found[~missing] = filled
    kinds, dtype = _DTYPES[kind]
    if found.ndim != 1 or (found.dtype.kind not in kinds and len(found)) or (length is not None and len(found) != length):
        raise damaged(path, where, f"{found.dtype} {found.shape}", allowed)
    if kind == "flag" and len(other := found[(found != 0) & (found != 1)]):
        raise damaged(path, where, other[0], "flags: true or false, 1 or 0")
    with np.errstate(over="ignore"):
        return found.astype(dtype), missing


@dataclass(slots=True, kw_only=True)
class SequenceTable:
    """Collects sequences; columns that a sequence lacks are missing there.

    Args:
        path: The file that they are of.
    """

    path: Path
    names: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    _columns: list[dict[str, Column]] = field(default_factory=list)
    _missing: list[dict[str, Bools]] = field(default_factory=list)
    _num_tokens: int = 0

    def add(
        self, name: str, columns: Mapping[str, Column], *, missing: Mapping[str, Bools] | None = None, group: str = ""
    ) -> None:
        """Add a sequence; `columns` are those of a token table without trajectory and group.

        Raises:
            TokenTableError: There are more tokens than a file may hold.
        """
        self._num_tokens += len(columns["token_id"])
        if self._num_tokens > MAX_TOKENS:
            raise damaged(self.path, "its number of tokens", f"{self._num_tokens} or more", f"at most {MAX_TOKENS}")
        self.names.append(name)
        self.groups.append(group)
        self._columns.append(dict(columns))
        self._missing.append(dict(missing or {}))

    def table(self) -> TokenTable:
        """The table of all of them.

        Raises:
            TokenTableError: A value is one that no token has.
        """
        names = sorted({name for columns in self._columns for name in columns})
        if not all("kept" in columns for columns in self._columns):
            names = [name for name in names if name != "kept"]  # which a table has for every token or for none
        lengths = [len(columns["token_id"]) for columns in self._columns]
        if not lengths:
            raise TokenTableError(
                f"{self.path} holds no sequence", got="0", allowed="at least 1", fix="dump a step that trains"
            )
        made: dict[str, Column] = {}
        marks: dict[str, Bools] = {}
        for name in names:
            dtype = next(columns[name].dtype for columns in self._columns if name in columns)
            blank = _BLANK.get(dtype.kind, -1)
            parts = [columns.get(name, np.full(num, blank, dtype)) for columns, num in zip(self._columns, lengths, strict=True)]
            made[name] = np.concatenate(parts)
            if dtype.kind == "f":
                marks[name] = np.concatenate([self._marks(i, name, num) for i, num in enumerate(lengths)])
                made[name][marks[name]] = np.nan
        made["trajectory"] = np.repeat(np.arange(len(lengths)), lengths)
        known: dict[str, Sequence[str]] = {"trajectory": self.names}
        if any(self.groups):
            known["group"] = list(dict.fromkeys(filter(None, self.groups)))
            codes = {name: code for code, name in enumerate(known["group"])}
            made["group"] = np.repeat([codes.get(name, -1) for name in self.groups], lengths)
        num = sum(lengths)
        made.setdefault("version", np.full(num, -1))
        made.setdefault("trainer_version", np.full(num, -1))
        if "logp_mu" not in made:
            made["logp_mu"], marks["logp_mu"] = np.full(num, np.nan, np.float32), np.ones(num, np.bool_)
        with naming(self.path):
            return TokenTable.of(made, marks, known)

    def _marks(self, sequence: int, name: str, num: int) -> Bools:
        if name not in self._columns[sequence]:
            return np.ones(num, np.bool_)
        return self._missing[sequence].get(name, np.zeros(num, np.bool_))
