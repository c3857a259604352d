"""The forward pass of one decode step: one token in each of the first rows of the slot table.

CPU    the rows that decode alone, tile by tile, each cropped to its longest sequence
GPU    rows and crop rounded up to powers of two: few shapes, each captured once as a CUDA graph and replayed

A step of a small model is some hundred kernels that take less time than their launches; a replay is one launch.
"""

from __future__ import annotations

from typing import Final, TypeAlias

import torch
from torch import Tensor

from oldlogits.engines.embedded.attention import TILE, DecodeAttention, JointAttention, PrefillAttention
from oldlogits.engines.embedded.decoder import Decoder
from oldlogits.engines.embedded.slots import SlotTable

_SHORTEST: Final = 128
"""The smallest crop of a captured step, in tokens."""

_FEWEST: Final = 4
"""Rows that a CPU computes at least: it adds up products of fewer in another order, and a token's log-prob depended on them."""


Joined: TypeAlias = tuple[Tensor, PrefillAttention]
"""Tokens of prompts, and how they see the cache."""


class DecodeStep:
    """Computes the final hidden states of the newest tokens, and writes their keys and values, and experts, to the caches.

    `has_few_shapes` rounds sizes up, and `is_captured` replays CUDA graphs; both are usual on a GPU. A mixture of experts is
    not captured there: how many tokens an expert serves is read in every layer.
    """

    def __init__(self, decoder: Decoder, cache: Tensor, routing: Tensor | None = None) -> None:
        on_gpu = decoder.device.type == "cuda"
        self._decoder, self._cache, self._routing = decoder, cache, routing
        self.has_few_shapes, self.is_captured = on_gpu, on_gpu and not decoder.config.is_routed
        self._inputs = torch.zeros(2, cache.shape[2], dtype=torch.int64, device=decoder.device)
        self._graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle() if self.is_captured else None

    def rows(self, table: SlotTable, num_rows: int) -> Tensor:
        """The slots that a step computes: of the first so many those that decode and few others, or with few shapes all."""
        if self.has_few_shapes:
            return torch.arange(num_rows)
        computed = table.active[:num_rows].clone()
        if len(computed) > _FEWEST > int(computed.sum()):
            computed[:_FEWEST] = True
        return computed.nonzero().squeeze(1)

    def hidden(self, table: SlotTable, slots: Tensor, joined: Joined | None = None) -> Tensor:
        """[slots, hidden] on the decoder's device, of those that `rows` returned; it may be overwritten by the next call.

        The pass also reads the tokens of `joined`, if it is there; not with few shapes.
        """
        seen = torch.where(table.active, table.position + 1, 0)
        if not self.has_few_shapes:
            crops = seen.view(-1, TILE).amax(dim=1)[: int(slots[-1]) // TILE + 1].tolist()
            tokens, position = _newest(table, slots)
            attention = DecodeAttention(slots, position, crops, self._cache)
            if joined is None:
                return self._decoder.forward(tokens, position, self._cache, attention, self._routing)
            read, reading = joined
            tokens, position = torch.cat((read, tokens)), torch.cat((reading.positions, position))
            both = JointAttention(reading, attention)
            return self._decoder.forward(tokens, position, self._cache, both, self._routing)[len(read) :]
        num_rows = len(slots)
        rows = _round_up(num_rows, TILE, self._cache.shape[2])
        crop = _round_up(int(seen.max()), _SHORTEST, self._cache.shape[4])
        for row, values in zip(self._inputs, _newest(table, torch.arange(rows)), strict=True):
            row[:rows].copy_(values, non_blocking=True)
        return (self._replay(rows, crop) if self.is_captured else self._run(rows, crop))[:num_rows]

    def _run(self, rows: int, crop: int) -> Tensor:
        """Rows in between, and those beyond the last that decodes, are computed and ignored."""
        tokens, position = self._inputs[:, :rows]
        slots = torch.arange(rows, device=position.device)
        attention = DecodeAttention(slots, position, [crop], self._cache, is_one_tile=True)
        return self._decoder.forward(tokens, position, self._cache, attention, self._routing)

    def _replay(self, rows: int, crop: int) -> Tensor:
        found = self._graphs.get((rows, crop))
        if found is None:
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # what is set up at a first call must not be captured
                self._run(rows, crop)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                out = self._run(rows, crop)
            found = self._graphs[rows, crop] = graph, out
        graph, out = found
        graph.replay()
        return out


def _newest(table: SlotTable, slots: Tensor) -> tuple[Tensor, Tensor]:
    """The newest token of each of these slots, and its position."""
    position = table.position[slots]
    return table.tokens.view(-1)[table.row_start[slots] + position], position


def _round_up(size: int, smallest: int, largest: int) -> int:
    """The next power of two, within bounds."""
    return min(max(smallest, 1 << (size - 1).bit_length()), largest)
