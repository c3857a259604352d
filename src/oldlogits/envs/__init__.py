"""The environment shape, the order desk, and adapters."""
