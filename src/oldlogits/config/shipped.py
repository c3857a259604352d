"""The recipes and examples that come with the package: beside the sources in a checkout, inside of the package in a wheel."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal

EXAMPLES: Final = ("guess", "number_guess", "openai_agent", "tau2_airline", "trl")
"""Folders of examples that `oldlogits init` copies."""


def shipped(kind: Literal["recipes", "examples"]) -> Path:
    """Return the folder that holds them; it is absent where only the modules were copied."""
    package = Path(__file__).parents[1]
    inside = package / kind
    return inside if inside.is_dir() else package.parents[1] / kind


def shipped_recipes() -> Mapping[str, Path]:
    """Return the shipped recipes by name, the file's name without its ending."""
    return {path.stem: path for path in sorted(shipped("recipes").glob("*.toml"))}


def found_recipe(recipe: Path) -> Path:
    """Return the recipe itself, or the shipped one of that name where there is no such file: ``desk``."""
    return recipe if recipe.suffix or recipe.exists() else shipped_recipes().get(str(recipe), recipe)
