"""How the tokens of a forward pass see the cache: the newest token of each slot, or stretches of several sequences."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Final, Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

TILE: Final = 32
"""Rows of one decode attention call: each tile is cropped to its own longest sequence, idle tiles are skipped."""


class Attention(Protocol):
    """How the tokens of one forward pass see the cache."""

    entries: Tensor
    """int64 [token]: where each token's entry stands in a cache seen as [slots * max_context]."""

    def write(self, key: Tensor, value: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write `key` and `value` [tokens, kv_heads, head_dim] to a layer's cache [slots, kv_heads, max_context, head_dim]."""

    def attend(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """[tokens, heads * head_dim] from a scaled `query` [tokens, heads, head_dim] and a layer's cache as it is written."""


def _cache_index(slots: Tensor, positions: Tensor, cache: Tensor) -> Tensor:
    """Where each (token, kv head) lives in a layer's cache seen as [slots * kv_heads * max_context, head_dim]."""
    num_kv_heads, max_context = cache.shape[-3], cache.shape[-2]
    heads = slots[:, None] * num_kv_heads + torch.arange(num_kv_heads, device=slots.device)
    return (heads * max_context + positions[:, None]).flatten()


class _Writing:
    """What both kinds of attention do alike.

    Args:
        index: int64 [tokens * kv_heads]: where each token's entries stand in a layer's cache of entries of one head.
    """

    def __init__(self, index: Tensor) -> None:
        self._index = index

    def write(self, key: Tensor, value: Tensor, keys: Tensor, values: Tensor) -> None:
        """See `Attention.write`."""
        for cache, new in ((keys, key), (values, value)):
            cache.view(-1, cache.shape[-1]).index_copy_(0, self._index, new.reshape(-1, cache.shape[-1]))


class DecodeAttention(_Writing):
    """One token for each of some slots, in their order; those of a tile see at most its crop of positions, 0 skips it.

    `is_one_tile`: they are the first slots, which a GPU takes together; to look which they are would be to wait for it.
    """

    def __init__(
        self, slots: Tensor, positions: Tensor, crops: Sequence[int], cache: Tensor, *, is_one_tile: bool = False
    ) -> None:
        num, device = len(slots), positions.device
        self.entries = slots * cache.shape[-2] + positions
        super().__init__(_cache_index(slots, positions, cache))
        self._slots = slots
        unseen = torch.arange(max(crops), device=device) > positions[:, None]
        self._bias = torch.zeros(num, 1, max(crops), device=device).masked_fill_(unseen[:, None], -torch.inf)
        self._tiles: list[tuple[int, int, Sequence[int], int]]
        if is_one_tile:
            self._tiles = [(0, num, range(num), crops[0])]
            return
        at = slots.tolist()
        bounds = [bisect_left(at, i * TILE) for i in range(len(crops) + 1)]
        self._tiles = [(i, j, at[i:j], crop) for i, j, crop in zip(bounds, bounds[1:], crops, strict=False) if crop and i < j]

    def attend(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """See `Attention.attend`. Rows of skipped tiles are 0."""
        rows, num_heads, head_dim = query.shape
        num_kv_heads = keys.shape[1]
        query = query.reshape(rows, num_kv_heads, -1, head_dim)
        out = torch.zeros_like(query)
        for start, end, slots, crop in self._tiles:
            seen_keys, seen_values = (self._seen(cached, start, end, slots, crop) for cached in (keys, values))
            scores = torch.bmm(query[start:end].flatten(0, 1), seen_keys.transpose(1, 2))
            scores.view(end - start, num_heads, crop).add_(self._bias[start:end, :, :crop])
            torch.bmm(
                torch.softmax(scores, dim=-1), seen_values, out=out[start:end].view(-1, num_heads // num_kv_heads, head_dim)
            )
        return out.view(rows, -1)

    def _seen(self, cached: Tensor, start: int, end: int, slots: Sequence[int], crop: int) -> Tensor:
        """[sequences * kv_heads, crop, head_dim]: the cache itself where the slots are neighbours, else a copy."""
        if slots[-1] - slots[0] == end - start - 1:
            return cached[slots[0] : slots[-1] + 1].flatten(0, 1)[:, :crop]
        return cached[:, :, :crop].index_select(0, self._slots[start:end]).flatten(0, 1)


class PrefillAttention(_Writing):
    """The tokens ``[start, start + count)`` of several sequences, packed one after the other.

    Where most entries are new, queries stand at their positions, those of entries that are known are left empty, and a causal
    kernel leaves out what is not seen; else a bias masks it.
    """

    def __init__(self, slots: Sequence[int], starts: Sequence[int], counts: Sequence[int], cache: Tensor) -> None:
        device, rows, num, start = cache.device, torch.tensor(slots), torch.tensor(counts), torch.tensor(starts)[:, None]
        longest, self._context = int(num.max()), int((start[:, 0] + num).max())
        self._is_causal = self._context < 2 * longest
        self._length = self._context if self._is_causal else longest
        position = torch.arange(self._length) + (0 if self._is_causal else start)
        valid = (position >= start) & (position < start + num[:, None])
        positions, slot_of = position.expand(len(slots), -1)[valid], rows.repeat_interleave(num)
        self._slots = rows.to(device)
        self.positions, self.entries = positions.to(device), (slot_of * cache.shape[-2] + positions).to(device)
        self._padded_at = valid.flatten().nonzero().squeeze(1).to(device)
        super().__init__(_cache_index(slot_of, positions, cache).to(device))
        self._bias: Tensor | None = None
        if not self._is_causal:
            unseen = torch.arange(self._context) > position[..., None]
            self._bias = torch.zeros(unseen.shape).masked_fill_(unseen, -torch.inf)[:, None].to(device)

    def attend(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """See `Attention.attend`."""
        padded = query.new_zeros(len(self._slots) * self._length, *query.shape[1:]).index_copy_(0, self._padded_at, query)
        seen_keys, seen_values = (cached[:, :, : self._context].index_select(0, self._slots) for cached in (keys, values))
        is_grouped = query.device.type == "cpu"
        if not is_grouped:  # a GPU's fused kernel takes a key head for each query head
            times = query.shape[1] // keys.shape[1]
            seen_keys, seen_values = (seen.repeat_interleave(times, dim=1) for seen in (seen_keys, seen_values))
        attended = F.scaled_dot_product_attention(
            padded.view(-1, self._length, *query.shape[1:]).transpose(1, 2),
            seen_keys,
            seen_values,
            attn_mask=self._bias,
            is_causal=self._is_causal,
            scale=1.0,
            enable_gqa=is_grouped,
        )
        return attended.transpose(1, 2).flatten(2).flatten(0, 1)[self._padded_at]


class JointAttention:
    """The tokens of one attention, then those of another, which see what the first write."""

    def __init__(self, first: Attention, second: Attention) -> None:
        self._parts, self._bound = (first, second), len(first.entries)
        self.entries = torch.cat((first.entries, second.entries))

    def write(self, key: Tensor, value: Tensor, keys: Tensor, values: Tensor) -> None:
        """See `Attention.write`."""
        for part, new_keys, new_values in zip(self._parts, self._split(key), self._split(value), strict=True):
            part.write(new_keys, new_values, keys, values)

    def attend(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """See `Attention.attend`."""
        return torch.cat([part.attend(q, keys, values) for part, q in zip(self._parts, self._split(query), strict=True)])

    def _split(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return tokens[: self._bound], tokens[self._bound :]
