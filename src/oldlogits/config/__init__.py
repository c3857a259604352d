"""TOML recipe and overrides to a checked `RunConfig`; imports no torch."""

from oldlogits.config.check import check, check_model_folder
from oldlogits.config.load import config_from_table, known_keys, load_config, override
from oldlogits.config.schema import RunConfig

__all__ = ["RunConfig", "check", "check_model_folder", "config_from_table", "known_keys", "load_config", "override"]
