"""Trajectories to tensors: the one place that knows packing and padding."""

from oldlogits.batch.collate import TokenBatch, collate
from oldlogits.batch.kv_segments import KVChain, KVSegment, kv_chains, segment_sequences
from oldlogits.batch.pad import MicroBatch, micro_batches, plan, read_lengths
from oldlogits.batch.sequences import Sequences, pack
from oldlogits.batch.shard import RankMicroBatch, shard_micro_batches

__all__ = [
    "KVChain",
    "KVSegment",
    "MicroBatch",
    "RankMicroBatch",
    "Sequences",
    "TokenBatch",
    "collate",
    "kv_chains",
    "micro_batches",
    "pack",
    "plan",
    "read_lengths",
    "segment_sequences",
    "shard_micro_batches",
]
