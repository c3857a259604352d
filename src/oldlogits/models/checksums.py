"""Checksums of a checkpoint: a file ``SHA256SUMS`` beside its folders, as ``sha256sum --check SHA256SUMS`` reads it.

Its first line is a comment with the checksum of the lines below. It is written last: a checkpoint that has it is whole.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from oldlogits.core.errors import ModelFolderError

SUMS: Final = "SHA256SUMS"
_FIRST: Final = b"# sha256 of the lines below: "


def sums_of(folder: Path, files: Iterable[Path]) -> dict[str, str]:
    """Bring files of a folder to the disk, and give their checksums by their names in the folder."""
    found = {}
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            found[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def files_of(folder: Path) -> list[Path]:
    """The files of a checkpoint, but for their checksums."""
    return sorted(path for path in folder.rglob("*") if not path.is_dir() and path != folder / SUMS)


def write_sums(folder: Path, sums: Mapping[str, str]) -> None:
    """Write the checksums of all files of a folder, and bring the names of all files to the disk."""
    lines = "".join(f"{value}  {name}\n" for name, value in sorted(sums.items())).encode()
    with (folder / SUMS).open("wb") as file:
        file.write(_FIRST + hashlib.sha256(lines).hexdigest().encode() + b"\n" + lines)
        file.flush()
        os.fsync(file.fileno())
    for path in (*(path for path in folder.rglob("*") if path.is_dir()), folder):
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def damage_of(folder: Path, part: str = "") -> list[str]:
    """Say of each file of a checkpoint that is not what was written what is wrong with it; none: the checkpoint is whole.

    With `part`, one of its folders, the files of the others are not looked at.
    """
    try:
        first, _, lines = (folder / SUMS).read_bytes().partition(b"\n")
    except OSError as error:
        return [f"{SUMS}: {error.strerror}"]
    if first != _FIRST + hashlib.sha256(lines).hexdigest().encode():
        return [f"{SUMS}: other bytes than were written"]
    entries = (line.split("  ", 1) for line in lines.decode().splitlines())
    due = {name: value for value, name in entries if name.startswith(part)}
    found = {path.relative_to(folder).as_posix(): path for path in files_of(folder)}
    wrong = [f"{name}: missing" for name in due if name not in found]
    for name, path in found.items():
        if name.startswith(part):
            wrong += [f"{name}: {text}" for text in _wrong(path, due.get(name))]
    return wrong


def check_model_sums(model: Path) -> None:
    """Refuse the model of a checkpoint if it is not what was written; of any other folder nothing is known.

    Raises:
        ModelFolderError: Files of it are damaged, missing, or were added; each is named.
    """
    checkpoint = model.resolve().parent
    if (checkpoint / SUMS).exists() and (wrong := damage_of(checkpoint, f"{model.resolve().name}/")):
        raise ModelFolderError(
            "the model of a checkpoint is not what was written",
            got=f"{checkpoint}: " + ", ".join(wrong),
            allowed=f"the files of {SUMS}, bit for bit",
            fix="restore these files from a copy, or take another checkpoint",
        )


def _wrong(path: Path, due: str | None) -> list[str]:
    if due is None:
        return ["not a file of the checkpoint"]
    try:
        with path.open("rb") as file:
            return [] if hashlib.file_digest(file, "sha256").hexdigest() == due else ["other bytes than were written"]
    except OSError as error:
        return [error.strerror or str(error)]
