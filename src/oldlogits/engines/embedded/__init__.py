"""The embedded engine: a small CPU decoder of the Llama and Qwen family, with continuous batching."""
