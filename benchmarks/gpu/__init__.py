"""One command for one GPU: the tests that need it, a table of what it reaches, and a training run; see docs/gpu.md."""
