"""A whole run, from a checked recipe to its summary and report."""
