"""``oldlogits init FOLDER``: a small project to begin with, a copy of an example that comes with the package."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from oldlogits.config.shipped import EXAMPLES, shipped
from oldlogits.core.errors import ConfigError, reading


@dataclass(frozen=True, slots=True, kw_only=True)
class InitOptions:
    """Write a project into FOLDER: environment, recipe, rows and test. The default one trains at once."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Absent or empty; it is made."""
    example: str = "guess"
    """What is copied: guess (trains without a model of yours), number_guess (tools), openai_agent, tau2_airline, trl."""


def command(arguments: Sequence[str]) -> int:
    """Copy the example, and say what to type next."""
    options = tyro.cli(InitOptions, prog="oldlogits init FOLDER", args=list(arguments))
    source, folder = _source(options.example), options.folder
    is_package = (source / "__init__.py").is_file()
    if is_package and folder.name != options.example:
        raise ConfigError(
            f"the modules of the example {options.example} name its folder",
            got=str(folder),
            allowed=f"a folder named {options.example}",
            fix=f"oldlogits init {options.example} --example {options.example}",
        )
    allowed, fix = "an absent or empty folder", "name another one"
    with reading(ConfigError, "the project cannot be written", got=str(folder), allowed=allowed, fix=fix):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError("there is something in the folder already", got=str(folder), allowed=allowed, fix=fix)
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    names = ", ".join(sorted(path.name for path in folder.iterdir()))
    print("\n".join([f"wrote {folder}: {names}", "", *_next(folder, is_package)]))
    return 0


def _source(example: str) -> Path:
    source = shipped("examples") / example
    if example not in EXAMPLES or not source.is_dir():
        there = [name for name in EXAMPLES if (shipped("examples") / name).is_dir()]
        raise ConfigError(
            "there is no such example", got=repr(example), allowed=", ".join(there), fix="oldlogits init my-agent"
        )
    return source


def _next(folder: Path, is_package: bool) -> list[str]:
    """What to type now."""
    recipes = sorted(path.name for path in folder.glob("*.toml"))
    lines = ["next:"] if is_package else ["next:", f"  cd {folder}"]
    for recipe in recipes:
        lines.append(f"  oldlogits train {folder / recipe if is_package else recipe} --dry-run    # what it will do")
        lines.append(f"  oldlogits train {folder / recipe if is_package else recipe}")
    tests = sorted(path.name for path in folder.glob("test_*.py"))
    return [*lines, *(f"  python -m pytest {test}" for test in tests), *([] if recipes else [f"  read {folder}"])]
