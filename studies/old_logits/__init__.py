"""The study of old logits: the same work under every method and route, and what came out side by side."""
