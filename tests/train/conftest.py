"""Recipes for the tiny model."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from oldlogits.config.load import config_from_table
from oldlogits.config.schema import RunConfig


@pytest.fixture(scope="session")
def recipe() -> Callable[..., RunConfig]:
    """``recipe(section={key: value}, key=value)``: a recipe without clipping of the gradient."""

    def make(**table: object) -> RunConfig:
        trainer = {"max_grad_norm": 1e9, "minibatches_per_update": 1, "lr": 0.01} | dict(table.pop("trainer", {}))  # type: ignore[call-overload]
        return config_from_table({"trainer": trainer, **table})

    return make
