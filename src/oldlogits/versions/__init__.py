"""Exact versions of the forward weights, and their average."""

from oldlogits.versions.decay import best_beta, growth_exponent, mean_lag_beta, window_beta
from oldlogits.versions.ewma import AverageScores, WeightAverage
from oldlogits.versions.store import FullCopyStore

__all__ = [
    "AverageScores",
    "FullCopyStore",
    "WeightAverage",
    "best_beta",
    "growth_exponent",
    "mean_lag_beta",
    "window_beta",
]
