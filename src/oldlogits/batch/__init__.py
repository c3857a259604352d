"""Trajectories to tensors: the one place that knows packing and padding."""

from oldlogits.batch.collate import TokenBatch, collate
from oldlogits.batch.kv_segments import Chain, Chunk, chains_of, cut_out
from oldlogits.batch.pad import MicroBatch, micro_batches, plan, read_lengths
from oldlogits.batch.sequences import Sequences, pack
from oldlogits.batch.shard import Dealt, deal

__all__ = [
    "Chain",
    "Chunk",
    "Dealt",
    "MicroBatch",
    "Sequences",
    "TokenBatch",
    "chains_of",
    "collate",
    "cut_out",
    "deal",
    "micro_batches",
    "pack",
    "plan",
    "read_lengths",
]
