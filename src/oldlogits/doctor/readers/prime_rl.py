"""prime-rl's token exports: ``token_exports/step_N/rank_R.jsonl``, one sequence a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final, Literal

import numpy as np

from oldlogits.batch.sequence_table import SequenceTable, array_of, damaged
from oldlogits.batch.token_table import each_once
from oldlogits.doctor.tokens import Batch

_NUMBERS: Final = {"inference_logprobs": "logp_mu", "trainer_logprobs": "logp_theta", "advantages": "advantage"}


def is_export(first_line: bytes) -> bool:
    """Whether a file that begins so is one of these."""
    return b'"inference_logprobs"' in first_line or b'"trainer_logprobs"' in first_line


def read(path: Path) -> Batch:
    """Read one export. It has no versions of its tokens; the step is taken for the trainer's version.

    Raises:
        TokenTableError: A line is no sequence.
    """
    found = SequenceTable(path=path)
    for number, record in lines(path):
        where = f"line {number}"
        token_id, _ = array_of(path, f"{where}, token_ids", record.get("token_ids"), "whole")
        num = len(token_id)
        columns = {"token_id": token_id, "index": np.arange(num)}
        columns["mask"], _ = array_of(path, f"{where}, loss_mask", record.get("loss_mask"), "flag", num)
        missing = {}
        for key, name in _NUMBERS.items():
            columns[name], missing[name] = array_of(path, f"{where}, {key}", record.get(key), "number", num)
            if np.isinf(columns[name]).any():
                raise damaged(path, f"{where}, {key}", "a number beyond float32", "finite numbers, and null for others")
        masked = record.get("is_masked")
        if isinstance(masked, list) and None not in masked:
            columns["kept"] = ~array_of(path, f"{where}, is_masked", masked, "flag", num)[0].astype(np.bool_)
        step = whole(path, where, record, "step")
        columns["trainer_version"] = np.full(num, step)
        place = "-".join(str(whole(path, where, record, key)) for key in ("step", "rank", "export_sequence_idx"))
        found.add(place, columns, missing=missing)
    table = found.table()
    notes = ("a log-prob that was not finite was exported as null",)
    return Batch(source=f"{path.parent.name}/{path.name}", framework="prime-rl", table=table, notes=notes)


def lines(path: Path) -> list[tuple[int, dict[str, object]]]:
    """The objects of a file of JSON lines with their numbers.

    Raises:
        TokenTableError: A line is no object, or holds a number that JSON does not have.
    """
    found = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line, parse_constant=_no_constant, object_pairs_hook=each_once)
            except (ValueError, RecursionError):
                record = None
            if not isinstance(record, dict):
                raise damaged(path, f"line {number}", repr(line[:60]), "one JSON object a line, each key once, numbers finite")
            found.append((number, record))
    return found


def whole(path: Path, where: str, record: dict[str, object], key: str, lowest: int = 0) -> int:
    """A whole number of a record."""
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value < 2**31:
        raise damaged(path, f"{where}, {key}", repr(value), f"a whole number from {lowest}")
    return value


def _no_constant(name: str) -> Literal[0]:
    raise ValueError(name)
