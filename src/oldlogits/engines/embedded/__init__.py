"""The embedded engine: a small decoder of the Llama and Qwen family, with continuous batching."""
