"""Optimizer steps, the trainer, and the warm start."""
