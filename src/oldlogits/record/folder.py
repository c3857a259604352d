"""The run folder: its layout (docs/run-folder.md), its refusal to overwrite, and its atomic writes."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Final, Self

import tomli_w

from oldlogits.core.errors import RunFolderError, told
from oldlogits.record.jsonl import Json

PACKAGES: Final = ("oldlogits", "torch", "transformers", "safetensors", "numpy", "pyarrow", "vllm", "ray")
"""Distributions whose versions are recorded."""

_VERSION_NAME: Final = re.compile(r"v(\d{6,})")


class RunFolder:
    """The files of one run. `create` makes it; ``RunFolder(path=...)`` reads an existing one."""

    def __init__(self, *, path: Path) -> None:
        self.path = path
        self.config, self.summary, self.report = path / "config.toml", path / "summary.json", path / "report.html"
        self.events, self.episodes = path / "events.jsonl", path / "episodes.jsonl"
        self.tokens, self.checkpoints, self.versions = path / "tokens", path / "checkpoints", path / "versions"

    @classmethod
    def create(cls, path: Path, *, resume: bool = False) -> Self:
        """Make the folder, or take it over to go on from its latest checkpoint.

        Raises:
            RunFolderError: It is not empty, or there is nothing to resume from.
        """
        folder = cls(path=path)
        if resume and (folder.latest_checkpoint() is None or not folder.config.exists()):
            raise RunFolderError(
                f"{path} cannot be resumed",
                got="no complete checkpoint" if folder.config.exists() else "no config.toml",
                allowed="a run folder with a checkpoint",
                fix="start the run in a new folder, without --resume",
            )
        if not resume and path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise RunFolderError(
                f"{path} is not an empty folder",
                got="a file" if path.is_file() else ", ".join(sorted(entry.name for entry in path.iterdir())[:6]),
                allowed="a folder that is absent or empty",
                fix="choose another --out, or go on with --resume",
            )
        for part in (folder.tokens, folder.checkpoints, folder.versions):
            part.mkdir(parents=True, exist_ok=True)
        write_json(folder.path / "environment.json", describe_environment())
        return folder

    def write_config(self, config: Mapping[str, object]) -> None:
        """Write the resolved recipe."""
        write_atomic(self.config, tomli_w.dumps(config))

    @contextmanager
    def checkpoint(self, version: int) -> Iterator[Path]:
        """A folder with ``model/`` and ``state/`` to fill; it gets its name only when the block ends without error."""
        final = self.checkpoints / version_name(version)
        partial = final.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        for part in ("model", "state"):
            (partial / part).mkdir(parents=True)
        yield partial
        shutil.rmtree(final, ignore_errors=True)
        partial.replace(final)

    def latest_checkpoint(self) -> Path | None:
        """The complete checkpoint of the highest version."""
        named = [(entry, _VERSION_NAME.fullmatch(entry.name)) for entry in self.checkpoints.glob("v*") if entry.is_dir()]
        return max(((int(match[1]), entry) for entry, match in named if match), default=(0, None))[1]


def unreadable_run(path: Path) -> AbstractContextManager[None]:
    """Tell whatever a folder that no run has written raises as an error of that folder."""
    allowed, fix = "the files that oldlogits train writes", "remove what is damaged, or name another folder"
    return told(RunFolderError, "the run folder cannot be read", got=str(path), allowed=allowed, fix=fix)


def version_name(version: int) -> str:
    """``v000012``: a version as the name of a file or folder."""
    return f"v{version:06d}"


def write_atomic(path: Path, text: str) -> None:
    """Write a whole text file, or nothing: readers never see a half of it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def write_json(path: Path, value: Mapping[str, Json]) -> None:
    """Write an indented JSON file atomically; the values are finite."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def describe_environment() -> Mapping[str, Json]:
    """Versions of Python, packages and platform, the CPU count, and the git commit of this code, if any."""
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "machine": platform.machine(),
        "num_cpus": os.cpu_count(),
        "packages": {name: _installed(name) for name in PACKAGES},
        "git_commit": _git_commit(),
    }


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of the working tree that this code lies in, if it does in one; "-dirty" where files differ from it."""
    here = Path(__file__).parent
    found = []
    for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--", str(here.parent)]):
        try:
            done = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, timeout=10, check=False)
        except (OSError, subprocess.SubprocessError):
            return None
        if done.returncode:
            return None
        found.append(done.stdout.strip())
    commit, changes = found
    return f"{commit}-dirty" if changes else commit
