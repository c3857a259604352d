"""Patches: the lossless difference between two versions, and the kernels that make and apply it."""
