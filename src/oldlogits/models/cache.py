"""Folders that are made once and kept: warm-started models and fetched ones."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def cache_folder() -> Path:
    """Return ``$OLDLOGITS_CACHE``, or ``~/.cache/oldlogits``."""
    return Path(os.environ.get("OLDLOGITS_CACHE") or Path.home() / ".cache" / "oldlogits")


def cached(folder: Path, fill: Callable[[Path], None]) -> Path:
    """Return the folder; unless it is there, `fill` writes its content first. It appears complete or not at all."""
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix="unfinished-", dir=folder.parent))
    try:
        fill(unfinished)
        unfinished.chmod(0o755)
        try:
            unfinished.rename(folder)
        except OSError:  # another process was faster: its folder holds the same
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder
