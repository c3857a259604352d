"""SkyRL's dumps of training batches, ``dumped_data/global_step_N_training_input.pkl``: padded on the left."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from oldlogits.batch.sequence_table import Column, SequenceTable, TensorLike, damaged, plain
from oldlogits.doctor.tokens import Batch

_NUMBERS: Final = {"rollout_logprobs": "logp_mu", "action_log_probs": "logp_old", "advantages": "advantage"}


def is_dump(content: object) -> bool:
    """Whether what a file holds is one of these."""
    return isinstance(content, dict) and "batch_dict" in content


def read(path: Path, content: Mapping[str, object]) -> Batch:
    """Read a dump. It has no versions; the step in its name is taken for the trainer's version.

    Raises:
        TokenTableError: A tensor is missing, or does not fit the others.
    """
    held = content["batch_dict"]
    if not isinstance(held, dict):
        raise damaged(path, "batch_dict", type(held).__name__, "tensors by name")
    sequences, attended, loss = (_tensor(path, held, name) for name in ("sequences", "attention_mask", "loss_mask"))
    if sequences.ndim != 2 or attended.shape != sequences.shape or loss.ndim != 2 or len(loss) != len(sequences):
        raise damaged(
            path, "its tensors", f"{sequences.shape}, {loss.shape}", "sequences [row, column], loss_mask [row, response]"
        )
    width = loss.shape[1]
    numbers = {name: _tensor(path, held, key) for key, name in _NUMBERS.items() if held.get(key) is not None}
    if any(values.shape != loss.shape for values in numbers.values()) or width > sequences.shape[1]:
        raise damaged(
            path, "its tensors", str({name: v.shape for name, v in numbers.items()}), f"the shape {loss.shape} of loss_mask"
        )
    step = re.search(r"global_step_(\d{1,9})", path.name)
    uids = _uids(content)
    found = SequenceTable(path=path)
    for row in range(len(sequences)):
        real = attended[row] > 0
        before = sequences.shape[1] - width
        columns: dict[str, Column] = {"token_id": sequences[row][real].astype(np.int64), "index": np.arange(int(real.sum()))}
        columns["mask"] = np.concatenate([np.zeros(before, np.bool_), loss[row] > 0])[real]
        for name, values in numbers.items():
            columns[name] = np.concatenate([np.full(before, np.nan), values[row]])[real].astype(np.float32)
        columns["trainer_version"] = np.full(int(real.sum()), int(step[1]) if step else -1)
        missing = {name: np.concatenate([np.ones(before, np.bool_), np.zeros(width, np.bool_)])[real] for name in numbers}
        found.add(f"row {row}", columns, missing=missing, group=uids[row] if row < len(uids) else "")
    return Batch(source=path.name, framework="SkyRL", table=found.table())


def _uids(content: Mapping[str, object]) -> list[str]:
    metadata = content.get("metadata")
    uids = metadata.get("uids") if isinstance(metadata, dict) else None
    return [str(uid) for uid in uids] if isinstance(uids, list | tuple) else []


def _tensor(path: Path, held: Mapping[str, object], name: str) -> NDArray[np.generic]:
    """A tensor as SkyRL serialises it: bytes, shape and dtype."""
    value = held.get(name)
    if isinstance(value, TensorLike):
        return plain(path, name, value)
    if not isinstance(value, dict) or not isinstance(value.get("data"), bytes):
        raise damaged(path, name, type(value).__name__, "a tensor")
    try:
        return np.frombuffer(value["data"], np.dtype(value["dtype"])).reshape(value["shape"])
    except (ValueError, TypeError, KeyError) as error:
        raise damaged(path, name, error, "bytes of its dtype and shape") from None
