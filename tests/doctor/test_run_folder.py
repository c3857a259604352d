"""A real run of this project is healthy, and the same run with its versions moved by one is not."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from oldlogits.cli.main import run as command
from oldlogits.core.errors import TokenTableError
from oldlogits.doctor.diagnose import Diagnosis, diagnose, examine
from oldlogits.doctor.readers import run_folder
from oldlogits.doctor.readers.door import read_batches
from oldlogits.doctor.tokens import Settings
from oldlogits.record.tables import SCHEMA
from oldlogits.run.run import run

from ..runs import recipe, tokens_of


@pytest.fixture(scope="module")
def played(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("doctor") / "run"
    config = recipe(tiny_folder, num_updates=8, engine={"precision": "bf16"}, record={"checkpoint_every": 1, "keep_every": 1})
    assert run(config, folder).error is None
    return folder


def moved(source: Path, folder: Path, **by: int) -> Path:
    """The run with columns of its token tables moved by some versions."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("checkpoints", "versions"))
    for path in (folder / "tokens").glob("*.parquet"):
        table = pq.read_table(path)
        for name, step in by.items():
            at = table.schema.get_field_index(name)
            values = pa.array(table[name].to_numpy() + step, table.schema.field(at).type)
            table = table.set_column(at, table.schema.field(at), values)
        pq.write_table(table, path)
    return folder


def findings(path: Path) -> dict[str, Diagnosis]:
    found = diagnose(read_batches([path]), Settings())
    return {one.check: one for one in found if one.verdict.outcome == "finding"}


@pytest.mark.slow
def test_a_run_is_silent_and_with_versions_moved_by_one_it_is_not(played: Path, tmp_path: Path) -> None:
    assert {check: one.verdict.says for check, one in findings(played).items()} == {}
    ahead = findings(moved(played, tmp_path / "ahead", version=1, staleness=-1))
    assert "ahead of the trainer's" in ahead["versions-impossible"].verdict.says
    behind = findings(moved(played, tmp_path / "behind", version=-1, staleness=1))
    assert behind.keys() & {"versions-missing", "old-is-theta"}
    assert "staleness" in findings(moved(played, tmp_path / "labels", version=-1))["versions-impossible"].verdict.says


@pytest.mark.slow
def test_the_bounds_of_a_run_are_those_of_its_recipe_and_one_table_can_be_read_alone(played: Path) -> None:
    (batch,) = read_batches([played])
    assert batch.settings is not None
    assert (batch.settings.band, batch.settings.stated, batch.framework) == (1.5, True, "oldlogits")
    (one,) = read_batches([played / "tokens" / "v000003.parquet"])
    assert {name.partition("/")[0] for name in one.table.trajectories} == {"v000003"}
    assert set(one.table.trainer_version.tolist()) == {2}


def test_a_run_without_tables_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokens").mkdir()
    with pytest.raises(TokenTableError, match="no token tables"):
        read_batches([tmp_path])


ROWS = 3
WHOLE = {
    "trajectory": pa.array(["a"] * ROWS).dictionary_encode(),
    "provenance": pa.array(["exact"] * ROWS).dictionary_encode(),
    "index": pa.array([2, 3, 5], pa.int32()),
    "context": pa.array([[1, 2], [], [4]], pa.list_(pa.int32())),
}
"""Columns of a table of three tokens; the others are zeros, or true."""


def table(folder: Path, **changed: pa.Array) -> Path:
    """A run folder of one table."""
    (folder / "tokens").mkdir(parents=True)
    zeros = {f.name: pa.array([1] * ROWS).cast(f.type) for f in SCHEMA if f.name not in WHOLE}
    pq.write_table(pa.table({**zeros, **WHOLE, **changed}), folder / "tokens" / "v000001.parquet")
    return folder


@pytest.mark.parametrize("with_context", [False, True])
@pytest.mark.parametrize("name", ["index", "token_id", "version", "trainer_version", "staleness", "loss_mask", "active_mask"])
def test_a_column_of_another_type_or_with_a_missing_value_is_refused_by_name(
    tmp_path: Path, name: str, with_context: bool
) -> None:
    assert read_batches([table(tmp_path / "whole")], with_context=with_context)[0].table.mask.sum() == ROWS
    missing = pa.array([None, 1, 1]).cast(SCHEMA.field(name).type)
    for number, column in enumerate([pa.array([0.5] * ROWS), pa.array(["x"] * ROWS), pa.array([[1]] * ROWS), missing]):
        with pytest.raises(TokenTableError, match=rf"v000001.*column {name} "):
            read_batches([table(tmp_path / str(number), **{name: column})], with_context=with_context)


def test_a_small_table_that_claims_any_number_of_tokens_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "MAX_TOKENS", 5)
    folder = table(tmp_path / "run")
    assert read_batches([folder])[0].table.num_tokens == ROWS
    with pytest.raises(TokenTableError, match=r"v000001.*7 tokens, above 5"):
        read_batches([folder], with_context=True)
    monkeypatch.setattr(run_folder, "MAX_TOKENS", 2)
    with pytest.raises(TokenTableError, match="3 tokens, above 2"):
        read_batches([folder / "tokens" / "v000001.parquet"])


@pytest.mark.slow
def test_with_its_checkpoints_old_is_computed_at_every_token_of_a_run_and_split_by_lag(
    played: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--weights", str(played / "checkpoints"), "--model", str(tiny_folder), "--json", str(tmp_path / "found.json")]
    assert command(["doctor", str(played), *words]) == 0
    printed, found = capsys.readouterr().out, json.loads((tmp_path / "found.json").read_text())
    assert "OLD was not computed" not in printed
    assert max(map(len, printed.splitlines())) <= 80
    told = tokens_of(played, "staleness", "log_r_d", "log_r_s")
    assert {row["lag"] for row in found["lags"]} == {0, 1, 2}
    for row in found["lags"]:
        at = told["staleness"] == row["lag"]
        assert row["num_tokens"] == at.sum()
        assert row["log_r_d"] == pytest.approx(np.abs(told["log_r_d"][at]).mean(), abs=1e-6)
        assert row["log_r_s"] == pytest.approx(np.abs(told["log_r_s"][at]).mean(), abs=1e-6)
        assert row["changed"] == 0
        assert f"{row['log_r_s']:.2e}" in printed


@pytest.mark.slow
def test_context_stands_where_it_was_read_and_what_has_no_weights_or_no_context_is_counted(
    played: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (batch,) = read_batches([played], with_context=True)
    columns = batch.table.columns()
    rows = {}  # as docs/replay.md reads them
    for path in sorted((played / "tokens").glob("*.parquet")):
        for row in pq.read_table(path).to_pylist():
            rows.setdefault(f"{path.stem}/{row['trajectory']}", []).extend([*row["context"], row["token_id"]])
    starts = batch.table.starts
    for i, name in enumerate(batch.table.trajectories):
        place = slice(starts[i], starts[i + 1])
        assert columns["token_id"][place].tolist() == rows[name]
        assert columns["index"][place].tolist() == list(range(len(rows[name])))
    (alone,) = read_batches([played])
    assert alone.table.mask.all()
    for name in ("token_id", "version", "logp_mu", "logp_old", "advantage", "temperature", "kept"):
        np.testing.assert_array_equal(columns[name][batch.table.mask], alone.table.columns()[name])

    assert command(["doctor", str(played), "--weights", str(played)]) == 0  # version 0 is no checkpoint
    num = int((tokens_of(played, "version")["version"] == 0).sum())
    assert f"OLD was not computed of {num} loss tokens of versions whose" in capsys.readouterr().out.replace("\n", " ")
    older = moved(played, tmp_path / "older")
    for path in (older / "tokens").glob("*.parquet"):
        pq.write_table(pq.read_table(path).drop_columns(["context", "temperature"]), path)
    assert command(["doctor", str(older), "--weights", str(played)]) == 0
    assert "without their whole context" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.slow
def test_what_a_run_took_for_old_at_arrival_is_seen_with_its_weights(tiny_folder: Path, tmp_path: Path) -> None:
    sections = {"variant": "decoupled_async", "record": {"checkpoint_every": 1, "keep_every": 1}}
    assert run(recipe(tiny_folder, num_updates=8, **sections), tmp_path / "run").error is None
    batches = read_batches([tmp_path / "run"], with_context=True)
    found = examine(batches, Settings(), weights=tmp_path / "run", model=str(tiny_folder))
    (verdict,) = [one.verdict for one in found.diagnoses if one.check == "decisions-with-old"]
    assert verdict.outcome == "finding", verdict.says
    assert [lag.changed > 0 for lag in found.lags] == [lag.lag > 0 for lag in found.lags]
