"""The embedded engine behind HTTP routes."""
