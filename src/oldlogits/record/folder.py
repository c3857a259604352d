"""The run folder: its layout (docs/run-folder.md), its refusal to overwrite, and its atomic writes."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from importlib import metadata
from pathlib import Path
from typing import Final, Self

import tomli_w

from oldlogits.core.errors import RunFolderError, reading, writing
from oldlogits.record.jsonl import Json

PACKAGES: Final = ("oldlogits", "torch", "transformers", "safetensors", "numpy", "pyarrow", "vllm", "ray")
"""Distributions whose versions are recorded."""

LOCK: Final = "owner.lock"
"""The file of a run folder that its one owner holds (record/owner.py)."""

_VERSION_NAME: Final = re.compile(r"v(\d{6,})")
_PARTIAL, _REPLACED = ".partial", ".replaced"
"""What the names of files and folders end with that do not count, or count only where there is nothing else."""


class RunFolder:
    """The files of one run. `create` makes it; ``RunFolder(path=...)`` reads an existing one."""

    def __init__(self, *, path: Path) -> None:
        self.path = path
        self.config, self.summary, self.report = path / "config.toml", path / "summary.json", path / "report.html"
        self.events, self.episodes = path / "events.jsonl", path / "episodes.jsonl"
        self.tokens, self.checkpoints, self.versions = path / "tokens", path / "checkpoints", path / "versions"
        self.rollouts = path / "rollouts"

    @classmethod
    def create(cls, path: Path, *, resume: bool = False) -> Self:
        """Make the folder, or take it over to go on from its latest checkpoint.

        Raises:
            RunFolderError: It is not empty, or there is nothing to resume from.
            RunWriteError: It cannot be written.
        """
        folder = cls(path=path)
        folder.check_free(resume=resume)
        with writing(path):
            for part in (folder.tokens, folder.checkpoints, folder.versions):
                part.mkdir(parents=True, exist_ok=True)
            folder._clean()
        write_json(folder.path / "environment.json", describe_environment())
        return folder

    def check_free(self, *, resume: bool) -> None:
        """Refuse a folder that a run may not begin in, or that cannot be resumed; nothing is written."""
        path, entries = self.path, sorted(entry.name for entry in self.path.iterdir()) if self.path.is_dir() else []
        is_started = any(not found.name.endswith(_PARTIAL) for found in self.checkpoints.glob("v*"))
        if resume and not (self.config.is_file() and is_started):
            raise RunFolderError(
                f"{path} cannot be resumed",
                got="no complete checkpoint" if self.config.exists() else "no config.toml",
                allowed="a run folder with a checkpoint",
                fix="start the run in a new folder, without --resume",
            )
        if not resume and path.exists() and (not path.is_dir() or entries not in ([], [LOCK])):
            raise RunFolderError(
                f"{path} is not an empty folder",
                got=", ".join(entries[:6]) or "a file",
                allowed="a folder that is absent or empty",
                fix="choose another --out, or go on with --resume",
            )

    def write_config(self, config: Mapping[str, object]) -> None:
        """Write the resolved recipe."""
        write_atomic(self.config, tomli_w.dumps(config))

    def begin_checkpoint(self, version: int) -> Path:
        """Make an empty folder with ``model/`` and ``state/``, which counts when `name_checkpoint` has given it its name."""
        partial = self.checkpoints / f"{version_name(version)}.{os.getpid()}.partial"
        with writing(partial):
            shutil.rmtree(partial, ignore_errors=True)
            for part in ("model", "state"):
                (partial / part).mkdir(parents=True)
        return partial

    def name_checkpoint(self, partial: Path) -> Path:
        """Let a folder that is whole, and on the disk, become the checkpoint of its version.

        One that it replaces is put aside first, and taken back by a resume that finds no other.
        """
        final = self.checkpoints / partial.name.partition(".")[0]
        replaced = final.with_suffix(_REPLACED)
        with writing(final):
            if final.exists():
                final.rename(replaced)
            partial.rename(final)
            sync(self.checkpoints)
            shutil.rmtree(replaced, ignore_errors=True)
        return final

    def remove_checkpoint(self, checkpoint: Path) -> None:
        """Remove a checkpoint, whose name goes first: none is seen that is not whole."""
        gone = checkpoint.with_suffix(_PARTIAL)
        with writing(gone):
            checkpoint.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)

    def all_checkpoints(self) -> dict[int, Path]:
        """The complete checkpoints by version, ascending."""
        named = [(entry, _VERSION_NAME.fullmatch(entry.name)) for entry in self.checkpoints.glob("v*") if entry.is_dir()]
        return dict(sorted((int(match[1]), entry) for entry, match in named if match))

    def latest_checkpoint(self) -> Path | None:
        """The complete checkpoint of the highest version."""
        return next(reversed(self.all_checkpoints().values()), None)

    def _clean(self) -> None:
        """Take back a checkpoint that was about to be replaced, and remove what a kill has left unfinished."""
        for replaced in self.checkpoints.glob(f"v*{_REPLACED}"):
            final = replaced.with_suffix("")
            shutil.rmtree(replaced) if final.exists() else replaced.rename(final)
        for partial in self.checkpoints.glob(f"v*{_PARTIAL}"):
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink()


def unreadable_run(path: Path) -> AbstractContextManager[None]:
    """Tell whatever a folder that no run has written raises as an error of that folder."""
    allowed, fix = "the files that oldlogits train writes", "remove what is damaged, or name another folder"
    return reading(RunFolderError, "the run folder cannot be read", got=str(path), allowed=allowed, fix=fix)


def version_name(version: int) -> str:
    """``v000012``: a version as the name of a file or folder."""
    return f"v{version:06d}"


def write_atomic(path: Path, text: str) -> None:
    """Write a whole text file, or nothing: readers never see a half of it, not even after a power failure.

    Raises:
        RunWriteError: It cannot be written.
    """
    partial = path.with_name(path.name + _PARTIAL)
    with writing(path):
        try:
            with partial.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise


def sync(folder: Path) -> None:
    """Bring the names of a folder's files to the disk."""
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
