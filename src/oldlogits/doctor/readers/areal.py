"""AReaL's dumps: whole batches as ``train_data/step_NNNNNN.pt``, and trajectories as JSON lines without tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from oldlogits.batch.sequence_table import Bools, Column, SequenceTable, TensorLike, array_of, damaged, plain
from oldlogits.doctor.readers.prime_rl import lines, whole
from oldlogits.doctor.tokens import Batch

_COLUMNS: Final = ("input_ids", "attention_mask", "loss_mask", "logprobs", "prox_logp", "advantages", "versions")
"""What is read of a trajectory; rewards and such are one a sequence."""


def is_batch(content: object) -> bool:
    """Whether what a file holds is a whole batch."""
    return isinstance(content, list) and bool(content) and isinstance(content[0], dict) and "input_ids" in content[0]


def is_trajectories(first_line: bytes) -> bool:
    """Whether a file that begins so holds trajectories."""
    return b'"version_rle"' in first_line or b'"head_version"' in first_line


def read(path: Path, content: Sequence[Mapping[str, object]]) -> Batch:
    """Read a whole batch: versions of every token, -1 on context.

    Once advantages are there AReaL has moved the mask and the log-probs of mu one token forward, for the next token's
    prediction; `prox_logp` always stands so. Both are moved back.

    Raises:
        TokenTableError: A trajectory lacks its tokens, or its tensors do not fit.
    """
    step = re.search(r"step_(\d{1,9})", path.name)
    found = SequenceTable(path=path)
    for number, given in enumerate(content):
        for row, one in enumerate(_rows(path, number, given)):
            where = f"trajectory {number}.{row}"
            token_id, _ = array_of(path, f"{where}, input_ids", one["input_ids"], "whole")
            num, moved = len(token_id), "advantages" in one
            given_mask, _ = array_of(path, f"{where}, loss_mask", one.get("loss_mask"), "flag", num)
            mask = np.roll(given_mask, 1) if moved else given_mask
            columns: dict[str, Column] = {"token_id": token_id, "index": np.arange(num), "mask": mask}
            missing: dict[str, Bools] = {}
            for key, name, is_moved in (
                ("logprobs", "logp_mu", moved),
                ("prox_logp", "logp_old", True),
                ("advantages", "advantage", True),
            ):
                if one.get(key) is not None:
                    values, missing[name] = array_of(path, f"{where}, {key}", one[key], "number", num)
                    columns[name] = np.roll(values, 1) if is_moved else values
            if one.get("versions") is not None:
                versions, _ = array_of(path, f"{where}, versions", one["versions"], "whole", num)
                columns["version"] = np.where(mask, np.maximum(versions, -1), -1)
            columns["trainer_version"] = np.full(num, int(step[1]) if step else -1)
            attended = one.get("attention_mask", np.ones(num, np.bool_))
            kept = array_of(path, f"{where}, attention_mask", attended, "flag", num)[0].astype(np.bool_)
            found.add(where, {name: column[kept] for name, column in columns.items()},
                      missing={name: marks[kept] for name, marks in missing.items()})  # fmt: skip
    return Batch(source=path.name, framework="AReaL", table=found.table())


def read_trajectories(path: Path) -> Batch:
    """Read trajectories: runs of versions and lengths of segments; there are no tokens and no log-probs.

    AReaL 1.0 writes the oldest and the newest version of a trajectory alone, and counts the -1 of context among them.

    Raises:
        TokenTableError: A line is no trajectory.
    """
    found, num_untold = SequenceTable(path=path), 0
    for number, record in lines(path):
        where = f"line {number}"
        seqlen, prompt = (whole(path, where, record, key) for key in ("seqlen", "prompt_len"))
        runs = record.get("version_rle")
        if runs is None:
            head, tail = (whole(path, where, record, key, -1) for key in ("head_version", "tail_version"))
            num_untold += head < 0 <= tail
            runs = [[tail if head == tail else -1, seqlen - prompt]]
        if not isinstance(runs, list) or not all(isinstance(run, list) and len(run) == 2 for run in runs):
            raise damaged(path, f"{where}, version_rle", repr(runs), "pairs of a version and a number of tokens")
        checked = [dict(zip(("version", "tokens"), run, strict=True)) for run in runs]
        versions = [whole(path, where, run, "version", -1) for run in checked]
        counts = [whole(path, where, run, "tokens") for run in checked]
        index, segment = _places(path, where, record, prompt, seqlen)
        if len(index) != sum(counts):
            raise damaged(path, f"{where}, version_rle", sum(counts), f"versions of {len(index)} sampled tokens")
        columns: dict[str, Column] = {
            "token_id": np.zeros(len(index), np.int64), "index": index, "mask": np.ones(len(index), np.bool_),
            "version": np.repeat(np.array(versions, np.int64), counts), "segment": segment,
        }  # fmt: skip
        found.add(
            f"{record.get('task_id')}/{record.get('sample_idx')} line {number}", columns, group=str(record.get("task_id", ""))
        )
    notes = ("tokens and log-probs are not in these dumps: only what versions show can be told",)
    said = (
        f"head_version is -1 in {num_untold:,} of {len(found.names):,} trajectories: the version of context, whose least is "
        "taken over all tokens, so that no lag can be told from it"
    )
    return Batch(
        source=path.name,
        framework="AReaL",
        table=found.table(),
        lacks=frozenset({"token_id"}),
        notes=notes,
        contradictions=(said,) if num_untold else (),
    )


def _places(path: Path, where: str, record: Mapping[str, object], prompt: int, seqlen: int) -> tuple[Column, Column]:
    """The positions of the sampled tokens, and their segments."""
    segments = record.get("segments")
    if segments is None:
        if not prompt <= seqlen <= 2**24:
            raise damaged(path, f"{where}, seqlen", seqlen, f"{prompt} to {2**24}")
        return np.arange(prompt, seqlen), np.zeros(seqlen - prompt, np.int64)
    if not isinstance(segments, list) or not all(isinstance(one, dict) for one in segments):
        raise damaged(path, f"{where}, segments", type(segments).__name__, "a list of objects with role and len")
    lengths = [whole(path, where, one, "len") for one in segments]
    if sum(lengths) > 2**24:
        raise damaged(path, f"{where}, segments", sum(lengths), f"at most {2**24} tokens")
    sampled = np.repeat([one.get("role") == "gen" for one in segments], lengths)
    return np.flatnonzero(sampled), np.repeat(np.arange(len(lengths)), lengths)[sampled]


def _rows(path: Path, number: int, given: Mapping[str, object]) -> Sequence[Mapping[str, object]]:
    """The sequences of a trajectory's tensors ``[row, token]`` or ``[token]``."""
    ids = given.get("input_ids") if isinstance(given, Mapping) else None
    if not isinstance(ids, TensorLike) or ids.ndim not in (1, 2):
        raise damaged(path, f"trajectory {number}, input_ids", type(ids).__name__, "a tensor [row, token]")
    if ids.ndim == 1:
        return [given]
    held = {key: given[key] for key in _COLUMNS if given.get(key) is not None}
    for key, value in held.items():
        if not isinstance(value, TensorLike) or value.ndim != 2 or len(value) != len(ids):
            got = (
                f"{len(value)} rows of {value.ndim} dimensions"
                if isinstance(value, TensorLike) and value.ndim
                else type(value).__name__
            )
            raise damaged(path, f"trajectory {number}, {key}", got, f"a tensor [{len(ids)}, token]")
    arrays = {key: plain(path, f"trajectory {number}, {key}", value) for key, value in held.items()}  # type: ignore[arg-type]
    return [{key: array[row] for key, array in arrays.items()} for row in range(len(arrays["input_ids"]))]
