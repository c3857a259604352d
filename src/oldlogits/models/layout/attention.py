"""Attention in a packed row: every token attends to the tokens of its node up to itself, and to the nodes above.

    node n    its own tokens, causal                       [starts[n], ends[n])  over the same
    what follows it, in whatever node                      [ends[n], lasts[n])   over all of n

On the CPU these are blocks of queries and keys, all of them slices of the row: nothing is copied, and what is shared is read
where it stands. A second block of the same queries is added by the logarithm of its sum of weights, and the gradient of each
block needs no more than the sum of all, as where attention is computed over blocks of keys.

On GPUs in half precision a kernel for sequences of unequal lengths is given every node with a copy of the keys that it attends
to; elsewhere, torch's attention the mask of each tree.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from oldlogits.batch.sequences import Bools, Ints
from oldlogits.batch.trie import Trie

_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_TAKES_GROUPS = "enable_gqa" in inspect.signature(varlen_attn).parameters  # from torch 2.12 on


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Tokens of a packed row that attend to others, or to each other.

    Args:
        queries: The tokens that attend: some nodes of one size, or all that follows a node.
        keys: The tokens that they attend to: the same, each node by itself and causally; or those of the node.
        count: How many nodes there are.
        mask: [query, key] of a node; what is added to their products where a window hides some; None: nothing.
    """

    queries: slice
    keys: slice
    count: int = 1
    mask: Tensor | None = None


@dataclass(slots=True, eq=False)
class Seen:
    """What the tokens of a packed row attend to, in layers of one kind: the mask that these are given.

    Args:
        trie: The places of its tokens.
        window: How many tokens back a layer sees, the token itself included; None: all of them.
    """

    trie: Trie
    window: int | None = None
    _blocks: list[Block] = field(default_factory=list)
    _below: list[Block] = field(default_factory=list)
    _trees: list[Tensor | None] = field(default_factory=list)
    _runs: tuple[Tensor, ...] = ()

    def __post_init__(self) -> None:
        """Forget a window that no sequence passes."""
        if self.window is not None and self.trie.positions.max() < self.window:
            self.window = None

    def blocks(self, dtype: torch.dtype) -> tuple[list[Block], list[Block]]:
        """Give the blocks of nodes, which stand side by side and hold each token once, and those of what follows a node."""
        if not self._blocks:
            starts, ends, lasts = self.trie.nodes.T
            edges = [0, *(1 + np.flatnonzero(np.diff(self.trie.sizes))).tolist(), len(starts)]
            for first, beyond in pairwise(edges):
                node = slice(int(starts[first]), int(ends[first]))
                mask, nodes = self._window_mask(node, node, dtype), slice(node.start, int(ends[beyond - 1]))
                self._blocks.append(Block(queries=nodes, keys=nodes, count=beyond - first, mask=mask))
            for start, end, last in self.trie.nodes[lasts > ends].tolist():
                near = slice(start if self.window is None else max(start, end - self.window + 1), end)
                if near.start < end:
                    below = slice(end, last)
                    self._below.append(Block(queries=below, keys=near, mask=self._window_mask(below, near, dtype)))
        return self._blocks, self._below

    def trees(self, device: torch.device) -> tuple[list[int], list[Tensor | None]]:
        """Give the number of tokens of each tree, a root with all that follows it, and its mask; None: it is causal."""
        starts, _, lasts = self.trie.nodes.T
        roots = np.flatnonzero(starts >= np.maximum.accumulate(np.concatenate([[0], lasts[:-1]])))
        if not self._trees:
            for first, beyond in pairwise([*roots.tolist(), len(starts)]):
                is_plain = beyond - first == 1 and self.window is None
                self._trees.append(None if is_plain else torch.from_numpy(self._mask(first, beyond)).to(device))
        return (lasts - starts)[roots].tolist(), self._trees

    def runs(self, device: torch.device) -> tuple[Tensor, ...]:
        """Give all that each node attends to, itself last: where queries and keys of each begin, and which keys these are.

        int32 [node + 1] twice, and int64 [key].
        """
        if not self._runs:
            paths: list[Ints] = []
            above: list[tuple[int, Ints]] = [(len(self.trie.positions), np.zeros(0, np.int64))]
            for start, end, last in self.trie.nodes.tolist():
                while above[-1][0] <= start:
                    above.pop()
                paths.append(np.concatenate([above[-1][1], np.arange(start, end)]))
                above.append((last, paths[-1]))
            queries, keys = (np.cumsum([0, *sizes]).astype(np.int32) for sizes in (self.trie.sizes, map(len, paths)))
            self._runs = tuple(torch.from_numpy(one).to(device) for one in (queries, keys, np.concatenate(paths)))
        return self._runs

    def _window_mask(self, queries: slice, keys: slice, dtype: torch.dtype) -> Tensor | None:
        at, to = self.trie.positions[queries], self.trie.positions[keys]
        if self.window is None or at.max() - to.min() < self.window:
            return None
        back = at[:, None] - to
        is_seen = torch.from_numpy((back >= 0) & (back < self.window))
        return torch.zeros(is_seen.shape, dtype=dtype).masked_fill_(
            ~is_seen, torch.finfo(dtype).min / 2
        )  # a query that sees none has a sum

    def _mask(self, first: int, beyond: int) -> Bools:
        """Tell which keys the tokens of the nodes ``[first, beyond)`` attend to, which are one tree."""
        begin, _, last = self.trie.nodes[first].tolist()
        is_seen = np.zeros((last - begin, last - begin), np.bool_)
        for start, end, after in (self.trie.nodes[first:beyond] - begin).tolist():
            is_seen[end:after, start:end] = True
            is_seen[start:end, start:end] = np.tri(end - start, dtype=np.bool_)
        if self.window is not None:
            positions = self.trie.positions[begin:last]
            is_seen &= positions[:, None] - positions < self.window
        return is_seen


def attend(query: Tensor, key: Tensor, value: Tensor, seen: Seen, scale: float | None) -> Tensor:
    """Attend in a packed row.

    Args:
        query: [1, head, token, dim].
        key: [1, kv_head, token, dim].
        value: [1, kv_head, token, dim].
        seen: What attends to what.
        scale: The factor of the products; None: that of torch.

    Returns:
        [1, token, head, dim].
    """
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    is_flat = query.shape[-1] == value.shape[-1]
    if query.device.type == "cpu" and is_flat:
        found: Tensor = _InBlocks.apply(query, key, value, seen.blocks(query.dtype), scale)  # type: ignore[no-untyped-call]
        return found
    if query.is_cuda and query.dtype != torch.float32 and is_flat and query.shape[-1] <= 256:
        return _in_runs(query, key, value, seen, scale)
    return in_trees(query, key, value, seen, scale)


def in_trees(query: Tensor, key: Tensor, value: Tensor, seen: Seen, scale: float | None) -> Tensor:
    """Attend as `attend` does, on any device: each tree by itself, under a mask of all of its tokens."""
    sizes, masks = seen.trees(query.device)
    groups = query.shape[1] // key.shape[1]
    trees = zip(*(torch.split(one, sizes, 2) for one in (query, key, value)), masks, strict=True)
    found = [
        nn.functional.scaled_dot_product_attention(
            q,
            k.repeat_interleave(groups, 1),
            v.repeat_interleave(groups, 1),
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
        )
        for q, k, v, mask in trees
    ]
    return torch.cat(found, 2).transpose(1, 2).contiguous()


def _in_runs(query: Tensor, key: Tensor, value: Tensor, seen: Seen, scale: float | None) -> Tensor:
    queries, keys, which = seen.runs(query.device)
    groups = query.shape[1] // key.shape[1]
    if not _TAKES_GROUPS:
        key, value = (one.repeat_interleave(groups, 1) for one in (key, value))
    in_runs = partial(varlen_attn, enable_gqa=groups > 1) if _TAKES_GROUPS else varlen_attn
    found = in_runs(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1)[which],
        value[0].transpose(0, 1)[which],
        queries,
        keys,
        int(seen.trie.sizes.max()),
        int(seen.trie.positions.max()) + 1,
        scale=scale,
        window_size=(-1 if seen.window is None else seen.window - 1, 0),
    )
    assert isinstance(found, Tensor), "the sums of weights are not asked for"
    return found[None]


class _InBlocks(torch.autograd.Function):
    """Attention block by block, each by the kernel that torch's own attention takes on the CPU."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        blocks: tuple[list[Block], list[Block]],
        scale: float | None,
    ) -> Tensor:
        """Give [1, token, head, dim]."""
        own, below = blocks
        sizes = [b.queries.stop - b.queries.start for b in own]
        q, k, v = _rows(query), _repeated(key, query), _repeated(value, query)
        found = [
            _FLASH(*(_nodes(one, b.count) for one in rows), 0.0, b.mask is None, attn_mask=b.mask, scale=scale)
            for b, *rows in zip(own, *(torch.split(one, sizes) for one in (q, k, v)), strict=True)
        ]
        out = torch.cat([one.transpose(1, 2).flatten(0, 1) for one, _ in found])
        weights = torch.cat([one.transpose(1, 2).flatten(0, 1) for _, one in found])  # the logarithm of their sum
        out = out.float() if below else out
        for b in below:
            rows = _nodes(q[b.queries]), _nodes(k[b.keys]), _nodes(v[b.keys])
            more, added = (one.transpose(1, 2)[0] for one in _FLASH(*rows, 0.0, False, attn_mask=b.mask, scale=scale))
            there, weight = out[b.queries], weights[b.queries]
            both = torch.logaddexp(weight, added)
            there.mul_((weight - both).exp_()[..., None]).addcmul_(more, (added - both).exp_()[..., None])
            weight.copy_(both)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, weights)
        ctx.blocks, ctx.sizes, ctx.scale = blocks, sizes, scale  # type: ignore[attr-defined]
        return out[None]

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """Give the gradients of queries, keys and values."""
        (own, below), sizes, scale = ctx.blocks, ctx.sizes, ctx.scale  # type: ignore[attr-defined]
        query, key, value, out, weights = ctx.saved_tensors  # type: ignore[attr-defined]
        tensors = (gradients[0][0], _rows(query), _repeated(key, query), _repeated(value, query), out, weights)
        found = [
            _FLASH_BACKWARD(*(_nodes(one, b.count) for one in rows), 0.0, b.mask is None, attn_mask=b.mask, scale=scale)
            for b, *rows in zip(own, *(torch.split(one, sizes) for one in tensors), strict=True)
        ]
        grads = [torch.cat([one.transpose(1, 2).flatten(0, 1) for one in part]) for part in zip(*found, strict=True)]
        for b in below:
            at = (b.queries, b.queries, b.keys, b.keys, b.queries, b.queries)
            parts = (_nodes(one[part]) for one, part in zip(tensors, at, strict=True))
            more = _FLASH_BACKWARD(*parts, 0.0, False, attn_mask=b.mask, scale=scale)
            for grad, part, added in zip(grads, at[1:4], more, strict=True):
                grad[part] += added.transpose(1, 2)[0]
        of_key, of_value = (torch.unflatten(grad, 1, (key.shape[1], -1)).sum(2) for grad in grads[1:])
        return (*(grad.transpose(0, 1)[None] for grad in (grads[0], of_key, of_value)), None, None)  # type: ignore[return-value]


def _rows(heads: Tensor) -> Tensor:
    """View [1, head, token, dim] as [token, head, dim]."""
    return heads[0].transpose(0, 1)


def _repeated(keys: Tensor, query: Tensor) -> Tensor:
    """Give keys, [1, kv_head, token, dim], as [token, head, dim]: the heads of a group read the same."""
    return _rows(keys).repeat_interleave(query.shape[1] // keys.shape[1], 1) if query.shape[1] > keys.shape[1] else _rows(keys)


def _nodes(rows: Tensor, count: int = 1) -> Tensor:
    """View rows of so many nodes of one size, [token, head, ...], as [node, head, token, ...]."""
    return torch.unflatten(rows, 0, (count, -1)).transpose(1, 2)
