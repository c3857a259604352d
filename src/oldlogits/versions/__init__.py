"""Exact versions of the forward weights."""
