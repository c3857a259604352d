"""verl (V1): the tokens of every update as a neutral token table, which `oldlogits doctor` and `oldlogits replay` read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import transfer_queue as tq
from transfer_queue import KVBatchMeta

from oldlogits.batch.sequence_table import SequenceTable
from oldlogits.batch.token_table import write_token_table
from oldlogits.integrations.verl import SPANS, versions_of

_NUMBERS = {"logp_mu": "rollout_log_probs", "logp_old": "old_log_probs", "advantage": "advantages"}


class TokenTables:
    """Goes before one of verl's trainers among the bases of a class; the driver writes one file an update.

    A token's version is that of its piece where `SpanClient` has kept them, the rollout's where its first and last are one,
    and null elsewhere: verl keeps no others. THETA is not there before the update.

    Attributes:
        token_folder: Where the tables go.
    """

    token_folder: Path
    global_steps: int
    _num_tables = 0

    def _update_actor(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        self._num_tables += 1
        self.token_folder.mkdir(parents=True, exist_ok=True)
        path = self.token_folder / f"v{self.global_steps:06d}_{self._num_tables:06d}.parquet"
        asked = ["input_ids", "prompts", "response_mask", "extra_fields", *_NUMBERS.values()]
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=asked)
        there = list(data.keys())
        values = {name: data[key].unbind() for name, key in _NUMBERS.items() if key in there}
        extra = [getattr(one, "data", one) for one in data["extra_fields"].tolist()]
        found = SequenceTable(path=path)
        for row, (ids, prompt, mask) in enumerate(
            zip(*(data[name].unbind() for name in ("input_ids", "prompts", "response_mask")), strict=True)
        ):
            before, num = len(prompt), len(ids)
            trained = np.concatenate([np.zeros(before, bool), mask.bool().numpy()])
            columns = {"token_id": ids.numpy(), "index": np.arange(num), "mask": trained}
            columns["version"] = np.concatenate([np.full(before, -1), _versions(extra[row], before, mask)])
            columns["trainer_version"] = np.full(num, self.global_steps)
            for name, rows in values.items():
                whole = np.concatenate([np.full(before, np.nan), rows[row].float().numpy()])
                columns[name] = np.where(trained, whole, np.nan).astype(np.float32)
            found.add(f"{path.stem}/{batch.keys[row]}", columns, missing=dict.fromkeys(values, ~trained))
        write_token_table(path, found.table())
        return super()._update_actor(batch, metrics)  # type: ignore[misc]


def _versions(extra: dict[str, Any], num_prompt: int, mask: Any) -> Any:
    """The version of each response token, -1 where it is not known."""
    if extra.get(SPANS):
        return versions_of(extra[SPANS], num_prompt, mask).numpy()
    first, last = (extra.get(f"{end}_global_steps") for end in ("min", "max"))
    return np.where(mask.bool().numpy(), first if first is not None and first == last else -1, -1)
