"""oldlogits: asynchronous reinforcement learning of LLM agents that never loses the old logits."""

__version__ = "0.2.0"
