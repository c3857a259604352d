"""TOML recipe and overrides to a checked `RunConfig`; imports no torch."""

from oldlogits.config.check import check, check_model_folder, resolve
from oldlogits.config.guard import Caution, cautions, kept_at_lag_0
from oldlogits.config.load import config_from_table, known_keys, load_config, override, read_toml
from oldlogits.config.reader import Table, build
from oldlogits.config.schema import RunConfig

__all__ = [
    "Caution",
    "RunConfig",
    "Table",
    "build",
    "cautions",
    "check",
    "check_model_folder",
    "config_from_table",
    "kept_at_lag_0",
    "known_keys",
    "load_config",
    "override",
    "read_toml",
    "resolve",
]
