"""``oldlogits init FOLDER``: write a small project that trains at once."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Final

import tyro

from oldlogits.core.errors import ConfigError, writing

FILES: Final = ("README.md", "agent.py", "recipe.toml", "rows.jsonl", "test_agent.py")
"""What a project begins with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InitOptions:
    """Write a small project: an environment, a recipe, rows, a test and a README of a few lines."""

    folder: Annotated[Path, tyro.conf.Positional]
    """The project's folder: absent or empty."""


def command(arguments: Sequence[str]) -> int:
    """Write the files, and say what to type next."""
    folder = tyro.cli(InitOptions, prog="oldlogits init", args=list(arguments)).folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(
            "the folder is in use", got=str(folder), allowed="an absent or empty folder", fix="oldlogits init my-agent"
        )
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            template = resources.files(__name__).joinpath(f"{name}.template" if name.endswith(".py") else name)
            (folder / name).write_bytes(template.read_bytes())
    print(f"train it:  cd {shlex.quote(str(folder))} && oldlogits train recipe.toml")
    return 0
