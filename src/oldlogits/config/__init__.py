"""TOML recipes and overrides to a checked `RunConfig`; imports no torch."""
