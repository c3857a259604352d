"""Exact versions of the forward weights, and their average."""

from oldlogits.versions.decay import best_beta, growth_exponent, mean_lag_beta, weighted_errors, window_beta
from oldlogits.versions.ewma import WeightAverage
from oldlogits.versions.growth import MeasuredGrowth, measured_growth
from oldlogits.versions.host_copy import HostCopy
from oldlogits.versions.patches.codec import apply, encode
from oldlogits.versions.patches.flat import FlatWeights
from oldlogits.versions.patches.kernel_choice import kernels_in_use
from oldlogits.versions.patches.layout import Entry, Layout, Shard
from oldlogits.versions.patches.patch import Patch, concatenate
from oldlogits.versions.store import PatchStore
from oldlogits.versions.warm_up import begin_numba, warm_up

__all__ = [
    "Entry",
    "FlatWeights",
    "HostCopy",
    "Layout",
    "MeasuredGrowth",
    "Patch",
    "PatchStore",
    "Shard",
    "WeightAverage",
    "apply",
    "begin_numba",
    "best_beta",
    "concatenate",
    "encode",
    "growth_exponent",
    "kernels_in_use",
    "mean_lag_beta",
    "measured_growth",
    "warm_up",
    "weighted_errors",
    "window_beta",
]
