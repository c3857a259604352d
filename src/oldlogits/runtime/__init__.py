"""The one training loop, and the runtimes that drive it."""
