"""TOML recipe and overrides to a checked `RunConfig`; imports no torch."""
