"""Trajectories to tensors: the one place that knows packing and padding."""
