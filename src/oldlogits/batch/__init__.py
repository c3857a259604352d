"""Trajectories to tensors: the one place that knows packing and padding."""

from oldlogits.batch.collate import TokenBatch, collate
from oldlogits.batch.pad import MicroBatch, micro_batches, plan
from oldlogits.batch.sequences import Sequences, pack

__all__ = ["MicroBatch", "Sequences", "TokenBatch", "collate", "micro_batches", "pack", "plan"]
