"""What `oldlogits compare` runs: the same work under every method and route, and what came out side by side."""
