"""TOML recipe and overrides to a checked `RunConfig`; imports no torch."""

from oldlogits.config.check import check, check_model_folder
from oldlogits.config.load import build, config_from_table, known_keys, load_config, override, read_toml
from oldlogits.config.schema import RunConfig

__all__ = [
    "RunConfig",
    "build",
    "check",
    "check_model_folder",
    "config_from_table",
    "known_keys",
    "load_config",
    "override",
    "read_toml",
]
