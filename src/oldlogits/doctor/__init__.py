"""Diagnoses of training batches, from their tokens: readers of dumps, checks, and a page."""
