"""Token tables: what is written is read back, missing values stay missing, and a stranger's file is refused by row."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from oldlogits.batch.token_columns import encode_names
from oldlogits.batch.token_table import TokenTable, read_token_table, write_token_table
from oldlogits.core.errors import TokenTableError

ROWS = [
    {
        "trajectory": "b",
        "index": 4,
        "token_id": 7,
        "mask": True,
        "version": 2,
        "trainer_version": 3,
        "logp_mu": -0.5,
        "logp_theta": -0.25,
    },
    {"trajectory": "b", "index": 3, "token_id": 9, "mask": False, "version": None, "trainer_version": 3, "logp_mu": None},
    {
        "trajectory": "a",
        "index": 0,
        "token_id": 1,
        "mask": True,
        "version": 0,
        "trainer_version": 3,
        "logp_mu": 0.0,
        "logp_theta": -1.0,
    },
]


def written(folder: Path, rows: list[dict[str, object]], kind: str) -> Path:
    path = folder / f"batch.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def changed(row: int, **values: object) -> list[dict[str, object]]:
    return [{**one, **values} if number == row else one for number, one in enumerate(ROWS)]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_rows_are_put_in_order_and_what_is_missing_is_marked(tmp_path: Path, kind: str) -> None:
    table = read_token_table(written(tmp_path, ROWS, kind))
    assert (table.trajectories, table.trajectory.tolist()) == (("b", "a"), [0, 0, 1])
    assert table.index.tolist() == [3, 4, 0]
    assert table.version.tolist() == [-1, 2, 0]
    np.testing.assert_array_equal(table.logp_mu, np.float32([np.nan, -0.5, 0.0]))
    assert {name: marks.tolist() for name, marks in table.missing.items()} == {
        "logp_mu": [True, False, False],
        "logp_theta": [True, False, False],
    }
    assert table.columns().keys() & {"logp_old", "segment"} == set()
    assert table.starts.tolist() == [0, 2, 3]
    assert table.name_of(1) == "b[4]"


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_what_is_written_is_read_back(tmp_path: Path, kind: str) -> None:
    columns = {
        "trajectory": np.array(["x", "x", "y"]), "group": np.array(["g", "g", ""]), "index": np.arange(3),
        "token_id": np.arange(3),
        "mask": np.array([True, False, True]), "version": np.array([0, -1, 2]), "trainer_version": np.array([3, 3, -1]),
        "logp_mu": np.array([-1.5, np.nan, -0.25]), "kept": np.array([True, True, False]), "segment": np.array([0, -1, 1]),
    }  # fmt: skip
    table = TokenTable.of(columns, {"logp_mu": np.array([False, True, False])})
    write_token_table(tmp_path / f"t.{kind}", table)
    back = read_token_table(tmp_path / f"t.{kind}")
    assert (back.trajectories, back.groups) == (("x", "y"), ("g",))
    assert back.columns()["group"].tolist() == [0, 0, -1]
    assert back.columns().keys() == table.columns().keys()
    for name, column in table.columns().items():
        np.testing.assert_array_equal(back.columns()[name], column)
    np.testing.assert_array_equal(back.missing["logp_mu"], table.missing["logp_mu"])


def test_a_recorded_nan_is_a_value_and_not_missing(tmp_path: Path) -> None:
    path = written(tmp_path, changed(0, logp_mu=float("nan")), "parquet")
    table = read_token_table(path)
    assert np.isnan(table.logp_mu).tolist() == [True, True, False]
    assert table.missing["logp_mu"].tolist() == [True, False, False]
    write_token_table(path, table)
    assert read_token_table(path).missing["logp_mu"].tolist() == [True, False, False]
    with pytest.raises(TokenTableError, match="write Parquet"):
        write_token_table(tmp_path / "t.jsonl", table)


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
@pytest.mark.parametrize(
    "row, values, said",
    [
        (1, {"index": -1}, "row 2"),
        (1, {"version": -1}, "row 2"),
        (2, {"token_id": None}, "row 3"),
        (2, {"token_id": 2**40}, "row 3"),
        (0, {"trajectory": ""}, "row 1"),
        (1, {"trajectory": None}, "row 2"),
        (1, {"mask": None}, "row 2"),
        (1, {"index": 4}, "row 2"),
        (1, {"logp_teta": 1.0}, "logp_teta"),
        (0, {"temperature": 0.0}, "in row 1"),
        (0, {"temperature": -1.0}, "in row 1"),
    ],
)  # fmt: skip
def test_what_no_token_has_is_refused_by_file_and_row(
    tmp_path: Path, kind: str, row: int, values: dict[str, object], said: str
) -> None:
    rows = changed(row, **values)
    if "logp_teta" in values:
        rows = [{**one, "logp_teta": 1.0} for one in rows]
    with pytest.raises(TokenTableError, match=f"batch.{kind}.*{said}"):
        read_token_table(written(tmp_path, rows, kind))


@pytest.mark.parametrize(
    "text, said",
    [
        ('{"trajectory": "a", "index": 0, "token_id": 1, "mask": true, "logp_mu": NaN}', "row 1"),
        ('{"trajectory": "a", "index": 0, "token_id": 1, "mask": true, "logp_mu": "-1"}', "row 1"),
        ('{"trajectory": "a", "index": 0, "token_id": 1, "mask": 1}', "row 1"),
        ('{"trajectory": "a", "index": 0.5, "token_id": 1, "mask": true}', "row 1"),
        ('{"trajectory": "a", "index": 0, "token_id": ' + "9" * 400 + ', "mask": true}', "row 1"),
        ('{"trajectory": "a", "index": 0, "token_id": 1, "mask": true}\n{"traj', "row 2"),
        ("[" * 2000, "row 1"),
        ("3", "row 1"),
        ('{"trajectory": "a"}', "row 1|index"),
        ("", "is no token table|columns"),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "b.jsonl"
    path.write_text(text)
    with pytest.raises(TokenTableError, match=f"b.jsonl.*({said})"):
        read_token_table(path)


def test_a_cut_or_foreign_parquet_file_is_named(tmp_path: Path) -> None:
    path = written(tmp_path, ROWS, "parquet")
    content = path.read_bytes()
    for damaged in (b"", b"PAR1", content[:-40], content[:40], content[: len(content) // 2] + content[-40:], b"\0" * 200):
        path.write_bytes(damaged)
        with pytest.raises(TokenTableError, match=r"batch.parquet"):
            read_token_table(path)
    with pytest.raises(TokenTableError, match="nowhere"):
        read_token_table(tmp_path / "nowhere.parquet")


@pytest.mark.parametrize("column", [pa.array([[1], [2]]), pa.array(["1", "2"]), pa.array([1.5, 2.0]), pa.array([b"1", b"2"])])
def test_a_column_of_another_type_is_named(tmp_path: Path, column: pa.Array) -> None:
    whole = pa.array([0, 1])
    table = pa.table({"trajectory": ["a", "a"], "index": whole, "token_id": column, "mask": [True, True], "version": whole,
                      "trainer_version": whole, "logp_mu": [0.5, 0.5]})  # fmt: skip
    pq.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(TokenTableError, match=r"t.parquet.*token_id"):
        read_token_table(tmp_path / "t.parquet")


def test_names_are_numbered_in_order_of_first_appearance() -> None:
    codes, names = encode_names(np.array(["z", "z", "a", "", "z"]))
    assert (codes.tolist(), names) == ([0, 0, 1, -1, 0], ("z", "a"))
    assert encode_names(np.array([9, 3, 9]))[1] == ("9", "3")


def test_marks_of_missing_values_stand_on_nan_alone() -> None:
    columns = {name: np.zeros(1, np.int32) for name in ("trajectory", "index", "token_id", "version", "trainer_version")}
    columns |= {"mask": np.ones(1, np.bool_), "logp_mu": np.zeros(1, np.float32)}
    with pytest.raises(TokenTableError, match="marks of missing"):
        TokenTable.of(columns, {"logp_mu": np.array([True])})


def test_the_callback_of_the_document_writes_a_padded_batch(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "token-table.md").read_text(encoding="utf-8")
    names: dict[str, object] = {}
    exec(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1], names)
    ids, mask = np.array([[5, 6, 0], [7, 8, 9]]), np.array([[0, 1, 0], [0, 1, 1]])
    logp = np.float32([[0, -1, 0], [0, -2, -3]])
    path = str(tmp_path / "step.parquet")
    names["dump"](path, token_id=ids, mask=mask, step=4, logp_mu=logp, logp_old=logp - 1, advantage=np.float32([0.5, 2]))
    table = read_token_table(path)
    assert table.columns()["advantage"][table.mask].tolist() == [0.5, 2, 2]
    assert table.trajectories == ("0", "1")
    assert table.token_id[table.mask].tolist() == [6, 8, 9]
    assert table.columns()["logp_old"][table.mask].tolist() == [-2.0, -3.0, -4.0]
    assert (set(table.trainer_version.tolist()), set(table.version.tolist())) == ({4}, {-1})
