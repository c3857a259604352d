"""Policies and variants, trajectories, the seams, and the errors."""
