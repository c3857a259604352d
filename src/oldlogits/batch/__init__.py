"""Trajectories to tensors: the one place that knows packing and padding."""

from oldlogits.batch.collate import TokenBatch, collate
from oldlogits.batch.pad import MicroBatch, micro_batches, plan

__all__ = ["MicroBatch", "TokenBatch", "collate", "micro_batches", "plan"]
