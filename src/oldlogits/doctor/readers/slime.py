"""Debug dumps of slime and miles, ``--save-debug-train-data``: a ``.pt`` file a rollout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from oldlogits.batch.sequence_table import Column, SequenceTable, TensorLike, array_of, damaged, plain
from oldlogits.doctor.tokens import Batch

_NUMBERS: Final = {"rollout_log_probs": "logp_mu", "log_probs": "logp_old", "advantages": "advantage"}
"""Columns of the response; `log_probs` is what the actor's forward before the update gave: what the clipped ratio is over."""


def is_dump(content: object) -> bool:
    """Whether what a file holds is one of these."""
    return isinstance(content, dict) and ("samples" in content or "rollout_data" in content)


def read(path: Path, content: Mapping[str, object]) -> Batch:
    """Read a dump: a list of samples (slime), or a dictionary of lists (miles, older slime).

    Raises:
        TokenTableError: A sample lacks its tokens, or its arrays have other lengths.
    """
    found = SequenceTable(path=path)
    for number, sample in enumerate(_samples(path, content)):
        where = f"sample {number}"
        token_id, _ = array_of(path, f"{where}, tokens", sample.get("tokens"), "whole")
        total = len(token_id)
        length = _length(path, where, sample, total)
        mask = np.zeros(total, np.bool_)
        mask[total - length :] = True
        if (given := sample.get("loss_masks", sample.get("loss_mask"))) is not None:
            mask[total - length :], _ = array_of(path, f"{where}, loss_masks", given, "flag", length)
        columns: dict[str, Column] = {"token_id": token_id, "index": np.arange(total), "mask": mask}
        missing = {}
        for key, name in _NUMBERS.items():
            if sample.get(key) is not None:
                values, absent = array_of(path, f"{where}, {key}", sample[key], "number", length)
                columns[name] = np.concatenate([np.full(total - length, np.nan, np.float32), values])
                missing[name] = np.concatenate([np.ones(total - length, np.bool_), absent])
        columns["version"] = np.where(mask, _version(sample), -1)
        if (counted := _number(path, f"{where}, rollout_mask_sums", sample.get("rollout_mask_sums"))) > 0:
            columns["loss_weight"] = np.where(mask, 1 / counted, np.nan).astype(np.float32)
        group = sample.get("rollout_ids", sample.get("group_index"))
        found.add(f"sample {number}", columns, missing=missing, group="" if group is None else str(group))
    return Batch(source=path.name, framework="slime", table=found.table())


def _samples(path: Path, content: Mapping[str, object]) -> Sequence[Mapping[str, object]]:
    samples = content.get("samples")
    if isinstance(data := content.get("rollout_data"), dict) and isinstance(tokens := data.get("tokens"), list | tuple):
        num = len(tokens)
        listed = {key: value for key, value in data.items() if _num_rows(value) == num}
        samples = [{key: value[i] for key, value in listed.items()} for i in range(num)]
    if not isinstance(samples, list) or not all(isinstance(sample, dict) for sample in samples):
        raise damaged(path, "its list of samples", type(samples).__name__, "'samples', or 'rollout_data' with 'tokens'")
    return samples


def _length(path: Path, where: str, sample: Mapping[str, object], total: int) -> int:
    """The tokens of the response, which stand last."""
    given = sample.get("response_lengths", sample.get("response_length"))
    length = _number(path, f"{where}, response_lengths", given)
    if not (0 <= length <= total and length.is_integer()):
        raise damaged(path, f"{where}, response_lengths", given, f"a whole number from 0 to its {total} tokens")
    return int(length)


def _num_rows(value: object) -> int:
    """How many samples a value is listed for; -1: it is no list."""
    if isinstance(value, TensorLike):
        return len(value) if value.ndim else -1
    return len(value) if isinstance(value, list | tuple | np.ndarray) else -1


def _number(path: Path, where: str, value: object) -> float:
    """A number, or a tensor of one; -1: neither."""
    if isinstance(value, TensorLike) and value.ndim == 0:
        value = plain(path, where, value).item()
    return float(value) if isinstance(value, int | float) and abs(value) < 2**53 else -1.0


def _version(sample: Mapping[str, object]) -> int:
    """The version that sampled a sample, where its calls had one alone; -1: not recorded, or a call's tokens are not."""
    calls = sample.get("weight_versions")
    versions = {str(call) for call in calls} if isinstance(calls, list | tuple) else set()
    only = versions.pop() if len(versions) == 1 else ""
    return int(only) if only.isdecimal() and len(only) < 10 else -1
