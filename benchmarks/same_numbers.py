"""Compare two run folders bit for bit: per-token tables, and the weights of every checkpoint.

    python -m benchmarks.same_numbers RUN_OF_THE_OLD_CODE RUN_OF_THE_NEW_CODE

Two `lockstep` runs of one recipe and one seed must agree whatever was moved or renamed in between. Only the columns that
both codes must have are compared; the command ends with status 1 and names what differs first.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import load_file

COLUMNS = ("token_id", "version", "staleness", "reward", "advantage", "logp_mu", "logp_theta", "log_r_d", "log_r_s")


def differences(old: Path, new: Path) -> tuple[list[str], int, int]:
    """What differs between two run folders, and how many rows and weights were compared.

    Raises:
        FileNotFoundError: The old run holds no table or no checkpoint, so nothing could be compared.
    """
    found: list[str] = []
    num_rows = num_weights = 0
    for kind, pattern in (("tokens", "*.parquet"), ("checkpoints", "*/model/*.safetensors")):
        names = sorted(path.relative_to(old) for path in (old / kind).glob(pattern))
        if not names:
            raise FileNotFoundError(f"{old / kind} holds no {pattern}")
        others = sorted(path.relative_to(new) for path in (new / kind).glob(pattern))
        found += [f"only in one run: {name}" for name in sorted(set(names) ^ set(others))]
        for name in sorted(set(names) & set(others)):
            if kind == "tokens":
                rows, wrong = _table(old / name, new / name)
                num_rows += rows
            else:
                weights, wrong = _weights(old / name, new / name)
                num_weights += weights
            found += [f"{name}: {one}" for one in wrong]
    return found, num_rows, num_weights


def _table(old: Path, new: Path) -> tuple[int, list[str]]:
    first, second = (pq.read_table(path, columns=list(COLUMNS)) for path in (old, new))
    return first.num_rows, [name for name in COLUMNS if _bits(first[name]) != _bits(second[name])]


def _bits(column: pa.ChunkedArray) -> tuple[str, bytes, bytes]:
    """The column's type, its values' bytes, and which of them are missing."""
    values = column.combine_chunks()
    missing = values.is_null().to_numpy(zero_copy_only=False)
    return str(values.type), values.fill_null(0).to_numpy(zero_copy_only=False).tobytes(), np.packbits(missing).tobytes()


def _weights(old: Path, new: Path) -> tuple[int, list[str]]:
    first, second = load_file(old), load_file(new)
    wrong = [f"only in one checkpoint: {name}" for name in sorted(set(first) ^ set(second))]
    wrong += [name for name in sorted(set(first) & set(second)) if first[name].tobytes() != second[name].tobytes()]
    return sum(weight.size for weight in first.values()), wrong


def main() -> int:
    """Compare, and say what was compared or what differs."""
    if len(sys.argv) != 3:
        print(__doc__)
        return 2
    found, num_rows, num_weights = differences(Path(sys.argv[1]), Path(sys.argv[2]))
    for one in found:
        print(one)
    print(f"{num_rows:,} rows of {len(COLUMNS)} columns and {num_weights:,} weights compared: {len(found)} differences")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
