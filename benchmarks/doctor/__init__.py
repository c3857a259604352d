"""The doctor's checks against healthy batches and planted faults."""
