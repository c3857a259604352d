from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from oldlogits.record.jsonl import RecordError
from oldlogits.record.tables import SCHEMA, sample_tokens, write_tokens


def columns(num_rows: int, first: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(first)
    made: dict[str, np.ndarray] = {"trajectory": np.array([f"t{i // 3}" for i in range(num_rows)], dtype=str)}
    made["context"] = np.zeros(np.arange(first, first + num_rows, 3).sum(), np.int32)
    made["step"], made["temperature"] = np.zeros(num_rows, np.int32), np.ones(num_rows)
    made["mixed_kv"] = np.zeros(num_rows, np.bool_)
    for name in ("index", "token_id", "version", "trainer_version", "staleness"):
        made[name] = np.arange(first, first + num_rows)
    made["provenance"] = np.array((["exact", "mixed_kv"] * num_rows)[:num_rows], dtype=object)
    for name in ("reward", "advantage", "logp_mu", "logp_proximal", "logp_theta", "log_r_d", "log_r_s"):
        made[name] = rng.standard_normal(num_rows)
    for name in ("loss_mask", "band_mask", "clip_mask", "active_mask"):
        made[name] = rng.random(num_rows) < 0.5
    return made


def test_a_table_is_read_back_as_it_was_written_non_finite_values_included(tmp_path: Path):
    written = columns(10)
    written["logp_mu"][3:6] = (np.nan, np.inf, -np.inf)
    path = write_tokens(tmp_path, 12, written)
    assert path.name == "v000012.parquet"
    assert pq.read_schema(path).equals(SCHEMA)
    assert pq.ParquetFile(path).metadata.row_group(0).column(0).compression == "ZSTD"
    found = sample_tokens(tmp_path, names=SCHEMA.names, max_rows=100)
    for name, values in written.items():
        if name == "context":
            continue
        expected = values.astype(np.float32) if values.dtype.kind == "f" else values
        np.testing.assert_array_equal(found[name], expected)


def test_the_context_before_each_trained_token_is_read_back_as_a_list(tmp_path: Path):
    written = columns(6) | {"index": np.array([2, 3, 6, 0, 1, 4]), "context": np.arange(50, 56)}
    path = write_tokens(tmp_path, 1, written)
    lists = pq.read_table(path).column("context").to_pylist()
    assert lists == [[50, 51], [], [52, 53], [], [], [54, 55]]


def test_an_update_without_tokens_is_a_table_of_no_rows(tmp_path: Path):
    write_tokens(tmp_path, 1, columns(0))
    write_tokens(tmp_path, 2, columns(4))
    assert len(sample_tokens(tmp_path, names=["index"], max_rows=10)["index"]) == 4


@pytest.mark.parametrize(
    "name, values, message",
    [
        ("index", np.zeros(5, dtype=np.int64), r"shape \(5,\)"),
        ("reward", np.zeros(4, dtype=np.int64), "a float dtype"),
        ("loss_mask", np.zeros(4), "a bool dtype"),
        ("version", np.zeros(4), "a int dtype"),
        ("trajectory", np.zeros(4), "a string dtype"),
        ("log_r_d", np.zeros((4, 1)), r"shape \(4, 1\)"),
        ("surprise", np.zeros(4), "got: surprise"),
        ("context", np.zeros(2, np.int32), "3 tokens by the indices"),
        ("context", np.zeros(3), "an int dtype"),
        ("index", np.array([2, 1, 3, 0]), "-2 before one"),
    ],
)
def test_a_column_that_does_not_fit_the_schema_is_refused_at_the_door(tmp_path: Path, name, values, message):
    with pytest.raises(RecordError, match=message):
        write_tokens(tmp_path, 1, {"logp_mu": np.zeros(4)} | columns(4) | {name: values})
    assert list(tmp_path.iterdir()) == []


def test_a_missing_column_is_named(tmp_path: Path):
    without = columns(4)
    del without["clip_mask"]
    with pytest.raises(RecordError, match="add clip_mask"):
        write_tokens(tmp_path, 1, without)


def test_a_sample_is_uniform_over_all_tables_and_keeps_rows_whole(tmp_path: Path):
    for version in range(5):
        write_tokens(tmp_path, version, columns(2_000, first=2_000 * version))
    found = sample_tokens(tmp_path, names=["index", "token_id"], max_rows=2_000)
    np.testing.assert_array_equal(found["index"], found["token_id"])
    counts = np.bincount(found["index"] // 2_000, minlength=5)
    # Binomial(2000, 0.2): mean 400, standard deviation 18; five of them stay within five deviations.
    assert np.all(np.abs(counts - 400) < 90)
    again = sample_tokens(tmp_path, names=["index"], max_rows=2_000)
    np.testing.assert_array_equal(found["index"], again["index"])


def test_no_tables_are_no_rows(tmp_path: Path):
    assert len(sample_tokens(tmp_path / "absent", names=["index"], max_rows=5)["index"]) == 0
