"""What a set of named tensors looks like: names, dtypes, shapes, and which part of each is held here."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor

from oldlogits.core.errors import LayoutError

WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The signed integers as which values are seen, by their bytes."""

ALIGNMENT = 64
"""Every entry begins at a multiple of so many bytes in its flat buffer; the bytes between are 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """The elements ``[start, stop)`` of a flattened parameter of `shape`, held as a tensor of ``stop - start`` elements."""

    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One parameter or buffer, or the part of it that is held here.

    Args:
        name: The Hugging Face name.
        dtype: A dtype of 1, 2, 4 or 8 bytes.
        shape: The shape of the whole parameter.
        start: First element held, of the flattened whole parameter.
        stop: One past the last.
        offset: The place of `start` in the flat buffer of this dtype, in elements; set by `Layout`.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int
    offset: int = 0

    def __post_init__(self) -> None:
        """Refuse ranges outside of the parameter and values that are no words."""
        if not 0 <= self.start <= self.stop <= math.prod(self.shape):
            raise LayoutError(
                f"{self.name}: a range outside of the parameter",
                got=f"elements [{self.start}, {self.stop}) of shape {self.shape}",
                allowed=f"within [0, {math.prod(self.shape)}]",
                fix="give the range in elements of the whole, flattened parameter",
            )
        if self.dtype.itemsize not in WORDS:
            raise LayoutError(
                f"{self.name}: values of {self.dtype.itemsize} bytes",
                got=str(self.dtype),
                allowed="dtypes of 1, 2, 4 or 8 bytes",
                fix="publish it as its real and imaginary part",
            )

    @property
    def numel(self) -> int:
        """Elements held here."""
        return self.stop - self.start

    @property
    def is_whole(self) -> bool:
        """Whether all of the parameter is held here."""
        return self.numel == math.prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Named tensors in one order, whatever the order they came in: two layouts of the same tensors are equal.

    Entries stand by descending item size, then dtype, name and start. All entries of one dtype share one flat buffer.

    Args:
        entries: What is held; offsets are set here.
        aliases: The further names of tied weights, each to the name of its entry.
        frozen: Names held by reference and never looked at; they are in no buffer, no patch and no digest.
    """

    entries: tuple[Entry, ...]
    aliases: Mapping[str, str] = field(default_factory=dict)
    frozen: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        """Order the entries, place them in their buffers, and refuse names that contradict each other."""
        order = sorted(self.entries, key=lambda e: (-e.dtype.itemsize, str(e.dtype), e.name, e.start))
        for a, b in pairwise(order):
            if a.name == b.name:
                raise _contradiction(a.name, f"twice: [{a.start}, {a.stop}) and [{b.start}, {b.stop})")
        names = {entry.name for entry in order}
        if len(names) < len(order):
            raise _contradiction("an entry", "under two dtypes")
        for name, target in self.aliases.items():
            if name in names or name in self.frozen or target not in names:
                raise _contradiction(name, f"as another name of {target}")
        if twice := names & self.frozen:
            raise _contradiction(min(twice), "as an entry and as frozen")
        object.__setattr__(self, "entries", tuple(_placed(order)))
        object.__setattr__(self, "aliases", dict(sorted(self.aliases.items())))

    @classmethod
    def of(
        cls,
        weights: Mapping[str, Tensor],
        *,
        frozen: Iterable[str] = (),
        dtype: torch.dtype | None = None,
        shards: Mapping[str, Shard] | None = None,
    ) -> Layout:
        """The layout of tensors; those that share their memory are one entry and its aliases.

        Args:
            weights: Tensors by name; their values are not read.
            frozen: Names that do not change during training.
            dtype: The dtype of all floating-point values, such as bfloat16 for float32 masters; None: each its own.
            shards: The ranges of the tensors that are a part of their parameter, by name.
        """
        shards, frozen = shards or {}, frozenset(frozen)
        if unknown := frozen - weights.keys():
            raise _contradiction(min(unknown), "as frozen, but not among the weights")
        entries: list[Entry] = []
        aliases: dict[str, str] = {}
        seen: dict[tuple[object, ...], str] = {}
        for name in sorted(weights.keys() - frozen):
            tensor = weights[name]
            if tensor.numel() and (first := seen.setdefault(memory_of(tensor), name)) != name:
                aliases[name] = first
                continue
            kept = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
            part = shards.get(name) or Shard(shape=tuple(tensor.shape), start=0, stop=tensor.numel())
            if part.stop - part.start != tensor.numel():
                raise _contradiction(name, f"{tensor.numel()} elements for [{part.start}, {part.stop})")
            entries.append(Entry(name=name, dtype=kept, shape=tuple(part.shape), start=part.start, stop=part.stop))
        return cls(entries=tuple(entries), aliases=aliases, frozen=frozen)

    @classmethod
    def union(cls, layouts: Sequence[Layout]) -> Layout:
        """The layout of shards together; ranges that meet become one.

        Raises:
            LayoutError: Shards overlap, leave a gap inside of what is held, or disagree about dtype, shape or names.
        """
        parts: dict[str, list[Entry]] = {}
        aliases: dict[str, str] = {}
        for layout in layouts:
            for entry in layout.entries:
                parts.setdefault(entry.name, []).append(entry)
            for name, target in layout.aliases.items():
                if aliases.setdefault(name, target) != target:
                    raise _contradiction(name, f"as another name of {target} and of {aliases[name]}")
        frozen = frozenset[str]().union(*(layout.frozen for layout in layouts))
        return cls(entries=tuple(_merged(entries) for entries in parts.values()), aliases=aliases, frozen=frozen)

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """The dtypes of the flat buffers, in order: wide values first."""
        return tuple(dict.fromkeys(entry.dtype for entry in self.entries))

    def numel(self, dtype: torch.dtype) -> int:
        """Elements of the flat buffer of `dtype`, the padding included."""
        return max((_padded(e.offset + e.numel, dtype) for e in self.entries if e.dtype == dtype), default=0)

    @property
    def num_values(self) -> int:
        """Values held, padding, aliases and frozen tensors excluded."""
        return sum(entry.numel for entry in self.entries)

    @property
    def num_bytes(self) -> int:
        """Bytes of one full copy of the values."""
        return sum(entry.numel * entry.dtype.itemsize for entry in self.entries)

    def to_json(self) -> str:
        """The layout as JSON."""
        entries = [[e.name, str(e.dtype).removeprefix("torch."), list(e.shape), e.start, e.stop] for e in self.entries]
        content = {"entries": entries, "aliases": self.aliases, "frozen": sorted(self.frozen)}
        return json.dumps(content, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> Layout:
        """Read what `to_json` wrote; a `LayoutError` if the text is no layout."""
        try:
            content = json.loads(text)
            entries = tuple(
                Entry(name=name, dtype=getattr(torch, dtype), shape=tuple(shape), start=start, stop=stop)
                for name, dtype, shape, start, stop in content["entries"]
            )
            return cls(entries=entries, aliases=content["aliases"], frozen=frozenset(content["frozen"]))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if isinstance(error, LayoutError):
                raise
            allowed, fix = "what Layout.to_json wrote", "write it again"
            raise LayoutError("a text is no layout", got=str(error), allowed=allowed, fix=fix) from error

    def difference(self, other: Layout) -> str:
        """In words, the first way in which `other` is not this layout; empty if it is."""
        mine, theirs = ({entry.name: entry for entry in layout.entries} for layout in (self, other))
        for name in sorted(mine.keys() | theirs.keys()):
            if name not in theirs or name not in mine:
                return f"{name} is {'missing' if name in mine else 'unknown here'}"
            here, there = (f"{e.dtype} {e.shape}[{e.start}:{e.stop}]" for e in (mine[name], theirs[name]))
            if here != there:
                return f"{name} is {there} instead of {here}"
        if self.aliases != other.aliases:
            return f"tied names are {dict(other.aliases)} instead of {dict(self.aliases)}"
        return "" if self.frozen == other.frozen else f"frozen names differ: {min(self.frozen ^ other.frozen)}"


def memory_of(tensor: Tensor) -> tuple[object, ...]:
    """What two tensors share exactly when they are tied: the place and the form of their values."""
    return (tensor.device, tensor.dtype, tensor.data_ptr(), tuple(tensor.shape), tensor.stride())


def words_of(tensor: Tensor) -> Tensor:
    """A contiguous tensor as one flat run of signed integers of its item size; no copy."""
    return tensor.reshape(-1).view(WORDS[tensor.dtype.itemsize])


def _padded(numel: int, dtype: torch.dtype) -> int:
    step = ALIGNMENT // dtype.itemsize
    return -(-numel // step) * step


def _placed(entries: Sequence[Entry]) -> Iterable[Entry]:
    ends: dict[torch.dtype, int] = {}
    for entry in entries:
        offset = ends.get(entry.dtype, 0)
        ends[entry.dtype] = offset + _padded(entry.numel, entry.dtype)
        yield entry if entry.offset == offset else replace(entry, offset=offset)


def _merged(entries: Sequence[Entry]) -> Entry:
    """Ranges of one parameter as one entry."""
    first = entries[0]
    held = sorted((entry for entry in entries if entry.numel), key=lambda entry: entry.start) or [first]
    for a, b in pairwise(held):
        if a.stop != b.start:
            raise _contradiction(first.name, f"shards [{a.start}, {a.stop}) and [{b.start}, {b.stop}) do not meet")
    if len({(entry.dtype, entry.shape) for entry in entries}) > 1:
        raise _contradiction(first.name, "shards of different dtypes or shapes")
    return replace(first, start=held[0].start, stop=held[-1].stop, offset=0)


def _contradiction(name: str, got: str) -> LayoutError:
    return LayoutError(
        f"{name}: names or ranges of tensors contradict each other",
        got=got,
        allowed="every element once, under one name; other names as aliases",
        fix="publish the same names, shapes and ranges in every version",
    )
