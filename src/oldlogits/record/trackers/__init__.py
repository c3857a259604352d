"""Tracking tools: one file each, which alone imports the tool's package, and the feed that follows the run for them."""
