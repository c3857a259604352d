"""Named tensors in flat buffers: the resident copy of a version."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oldlogits.core.errors import LayoutError
from oldlogits.versions.patches.digest import MASK, key_of, signed
from oldlogits.versions.patches.kernel_choice import kernels_for
from oldlogits.versions.patches.layout import WORDS, Layout, Shard, memory_of, words_of

Ints = NDArray[np.int64]


class EntryTable(NamedTuple):
    """What kernels read of a layout, int64 [entry]: place in the buffer, first element, elements, key of the digest."""

    offsets: Ints
    starts: Ints
    numels: Ints
    keys: Ints


class FlatWeights:
    """A layout, one flat buffer per dtype, and views into them by name. All buffers lie on one device.

    A model on several devices has one `FlatWeights` for each: they are shards of one version, and their patches concatenate.

    Args:
        layout: What is held.
        buffers: One flat tensor of ``layout.numel(dtype)`` elements a dtype; used, not copied (it may be shared memory).
        frozen: The tensors under the layout's frozen names; used, not copied.

    Attributes:
        digest: The digest of the bits in the buffers, unsigned; None where it is not known, while they are being changed, and
            after such a change broke off: then the buffers hold no version until they are written anew.
    """

    digest: int | None = None

    def __init__(
        self, layout: Layout, buffers: Mapping[torch.dtype, Tensor], *, frozen: Mapping[str, Tensor] | None = None
    ) -> None:
        frozen = {name: (frozen or {})[name].detach() for name in sorted(layout.frozen)}
        for dtype in layout.dtypes:
            if buffers[dtype].shape != (layout.numel(dtype),) or buffers[dtype].dtype != dtype:
                raise LayoutError(
                    "a flat buffer does not fit its layout",
                    got=f"{buffers[dtype].dtype} {tuple(buffers[dtype].shape)}",
                    allowed=f"{dtype} ({layout.numel(dtype)},)",
                    fix="allocate layout.numel(dtype) elements for each of layout.dtypes",
                )
        self.layout = layout
        rows = [(e.offset, e.start, e.numel, signed(key_of(e.name))) for e in layout.entries]
        self.table = EntryTable(*np.array(rows, dtype=np.int64).reshape(-1, 4).T)
        self.buffers = {dtype: buffers[dtype] for dtype in layout.dtypes}
        self.frozen: Mapping[str, Tensor] = MappingProxyType(frozen)
        views = {e.name: buffers[e.dtype].narrow(0, e.offset, e.numel) for e in layout.entries}
        views |= {e.name: views[e.name].view(e.shape) for e in layout.entries if e.is_whole}
        views |= {name: views[target] for name, target in layout.aliases.items()}
        self.weights: Mapping[str, Tensor] = MappingProxyType(views | frozen)

    @classmethod
    def empty(
        cls, layout: Layout, *, device: torch.device | str = "cpu", frozen: Mapping[str, Tensor] | None = None
    ) -> FlatWeights:
        """Make a copy whose values are all 0, and whose digest is not known."""
        buffers = {dtype: torch.zeros(layout.numel(dtype), dtype=dtype, device=device) for dtype in layout.dtypes}
        return cls(layout, buffers, frozen=frozen)

    @classmethod
    def of(
        cls,
        weights: Mapping[str, Tensor],
        *,
        frozen: Iterable[str] = (),
        dtype: torch.dtype | None = None,
        shards: Mapping[str, Shard] | None = None,
        device: torch.device | str | None = None,
    ) -> FlatWeights:
        """Copy `weights`, the frozen ones excepted, to a device (None: that of the first), and take the digest.

        The other arguments are those of `Layout.of`.
        """
        layout = Layout.of(weights, frozen=frozen, dtype=dtype, shards=shards)
        place = next((tensor.device for tensor in weights.values()), "cpu") if device is None else device
        copy = cls.empty(layout, device=place, frozen=weights)
        copy.load(weights)
        return copy

    @property
    def device(self) -> torch.device:
        """The device of the buffers."""
        return next((buffer.device for buffer in self.buffers.values()), torch.device("cpu"))

    @property
    def num_bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.nbytes for buffer in self.buffers.values())

    def words(self, dtype: torch.dtype) -> Tensor:
        """The buffer of `dtype` as signed integers."""
        return self.buffers[dtype].view(WORDS[dtype.itemsize])

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Write all values anew, cast to the layout's dtypes, and take their digest: one full copy.

        Raises:
            LayoutError: `weights` do not fit the layout; nothing was written.
        """
        fitting = fit(self.layout, weights)
        self.digest = None
        for entry in self.layout.entries:
            target = self.buffers[entry.dtype].narrow(0, entry.offset, entry.numel)
            target.view(fitting[entry.name].shape).copy_(fitting[entry.name])
        self.digest = self.full_digest()

    def full_digest(self) -> int:
        """The digest of the bits in the buffers, from a pass over all of them; unsigned."""
        total = 0
        for dtype in self.layout.dtypes:
            rows, words = self.rows(dtype), self.words(dtype)
            total += kernels_for(words).digest(words, *(column[rows] for column in self.table))
        return total & MASK

    def rows(self, dtype: torch.dtype) -> slice:
        """The entries of the layout that are of `dtype`."""
        at = [i for i, entry in enumerate(self.layout.entries) if entry.dtype == dtype]
        return slice(at[0], at[-1] + 1) if at else slice(0, 0)


def fit(layout: Layout, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Find the tensor of each entry of `layout`; tied weights may come under any of their names, frozen ones are left out.

    Raises:
        LayoutError: A name is missing or unknown, a shape or dtype differs (floating-point values are cast), or names that
            the layout ties have values that differ.
    """
    found: dict[str, Tensor] = {}
    names: dict[str, list[str]] = {entry.name: [entry.name] for entry in layout.entries}
    for name, target in layout.aliases.items():
        names[target].append(name)
    known = {entry.name for entry in layout.entries} | layout.aliases.keys() | layout.frozen
    if unknown := weights.keys() - known:
        raise _unfit(min(unknown), "a name that the layout lacks", f"{len(known)} names")
    for entry in layout.entries:
        given = [name for name in names[entry.name] if name in weights]
        if not given:
            raise _unfit(entry.name, "no such tensor", "every entry of the layout")
        new = found[entry.name] = weights[given[0]]
        shape = entry.shape if entry.is_whole else (entry.numel,)
        fits = tuple(new.shape) in (shape, (entry.numel,)) or (not entry.is_whole and new.numel() == entry.numel)
        castable = new.is_floating_point() and entry.dtype.is_floating_point
        if not fits or not (new.dtype == entry.dtype or castable):
            raise _unfit(entry.name, f"{new.dtype} {tuple(new.shape)}", f"{entry.dtype} {shape}, or another float")
        for name in given[1:]:
            if memory_of(weights[name]) != memory_of(new) and not same_bits(weights[name], new):
                raise _unfit(name, f"values that differ from those of {given[0]}", "one value: the layout ties the two")
    return found


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and bits."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(torch.equal(words_of(a.detach().contiguous()), words_of(b.detach().to(a.device).contiguous())))


def fingerprint(name: str, tensor: Tensor) -> str:
    """Dtype, shape and digest of a tensor, in one word."""
    whole = tensor.detach().contiguous()
    zero, numel, key = (np.array([n], dtype=np.int64) for n in (0, whole.numel(), signed(key_of(name))))
    digest = kernels_for(whole).digest(words_of(whole), zero, zero, numel, key) & MASK
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}-{digest:016x}"


def check_fingerprints(expected: Mapping[str, str], given: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are not those with these fingerprints; a `LayoutError` names one that is missing or differs."""
    for name, print_then in expected.items():
        found = fingerprint(name, given[name]) if name in given else "no such tensor"
        if found != print_then:
            raise LayoutError(
                f"{name}: not the frozen tensor that the versions on disk were published with",
                got=found,
                allowed=print_then,
                fix="open the store with frozen= the tensors of the model that it began with",
            )


def _unfit(name: str, got: str, allowed: str) -> LayoutError:
    return LayoutError(
        f"{name}: the weights do not fit the layout of the versions before",
        got=got,
        allowed=allowed,
        fix="publish the same names, shapes and dtypes in every version, or begin a new store",
    )
