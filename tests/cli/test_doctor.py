"""The verb: its lines fit 80 columns, its exit status says whether there is a finding, JSON and page hold the evidence."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks.doctor.faults import FAULTS
from benchmarks.doctor.world import Setting, make_world
from oldlogits.batch.token_table import TokenTable, read_token_table, write_token_table
from oldlogits.cli.main import FAILED, REFUSED, run


@pytest.fixture
def healthy(tmp_path: Path) -> Path:
    world = make_world(Setting.draw(5, lag="mixed"))
    write_token_table(tmp_path / "healthy.parquet", world.table(world.columns()))
    return tmp_path / "healthy.parquet"


@pytest.fixture
def faulty(tmp_path: Path) -> Path:
    fault = next(fault for fault in FAULTS if fault.check == "old-is-theta")
    (batch,) = fault.plant(Setting.draw(5, lag="mixed"))
    write_token_table(tmp_path / "faulty.parquet", batch.table)
    return tmp_path / "faulty.parquet"


def test_a_healthy_file_has_status_0_and_every_line_fits(
    healthy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run(["doctor", str(healthy)]) == 0
    printed = capsys.readouterr().out
    assert "nothing found" in printed
    assert max(map(len, printed.splitlines())) <= 80


def test_a_finding_has_status_1_its_remedy_in_the_frameworks_keys_and_its_evidence_in_json(
    faulty: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run(["doctor", str(faulty), "--framework", "AReaL", "--json", str(tmp_path / "d.json")]) == FAILED
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert "use_decoupled_loss" in printed
    assert "r_d and r_s cannot be split at a lag above 0" in " ".join(printed.split())
    said = json.loads((tmp_path / "d.json").read_text())
    verdict = next(one for one in said["verdicts"] if one["check"] == "old-is-theta")
    assert verdict["outcome"] == "finding"
    assert verdict["num_tokens"] > 1000
    assert re.fullmatch(r"t\d+\[\d+\]", verdict["where"][0])
    assert "PatchStore" in verdict["remedy"]


def test_a_remedy_is_printed_once(faulty: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.parquet"
    other.write_bytes(faulty.read_bytes())
    assert run(["doctor", str(faulty), str(other), "--framework", "AReaL"]) == FAILED
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("with oldlogits.integrations.areal.ExactProxLogp") == 1
    assert printed.count("remedy: that of ratio-is-one") >= 3


def test_what_cannot_be_told_is_said_with_its_reason_and_the_last_line_counts_the_findings(
    faulty: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    table = read_token_table(faulty)
    columns = {name: column for name, column in table.columns().items() if name not in ("kept", "advantage")}
    columns["logp_mu"] = np.abs(columns["logp_mu"])
    names = {"trajectory": table.trajectories} | ({"group": table.groups} if "group" in columns else {})
    write_token_table(
        faulty, TokenTable.of(columns, {name: marks for name, marks in table.missing.items() if name in columns}, names)
    )
    assert run(["doctor", str(faulty)]) == FAILED
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert "cannot tell: clip-never-acts: the file holds no advantage, kept" in lines
    assert re.fullmatch(r"\d+ findings; \d+ checks cannot tell from these files", lines[-1])
    assert "pass on what are log-probs of softmax(logits / temperature)" in " ".join(" ".join(lines).split())


def test_the_page_is_one_file_with_every_verdict_and_no_markup_of_a_strangers_names(faulty: Path, tmp_path: Path) -> None:
    path = tmp_path / "<b>&.parquet"
    faulty.rename(path)
    assert run(["doctor", str(path), "--page", str(tmp_path / "d.html")]) == FAILED
    page = (tmp_path / "d.html").read_text()
    assert "&lt;b&gt;&amp;.parquet" in page
    assert "<b>&.parquet" not in page
    assert "http" not in page.replace("http://www.w3.org", "")
    assert page.count("<svg") == 4
    assert all(word in page for word in ("ratio-is-one", "few-tokens", "Remedy", "What these files cannot tell"))


@pytest.mark.parametrize(
    "words, said",
    [
        ([], "nothing to examine"),
        (["absent.parquet"], "absent.parquet"),
        (["HEALTHY", "--band", "0.5"], "--band is out of range\n     got: 0.5\n allowed: above 1\n"),
        (["HEALTHY", "--temperature", "0"], "--temperature is out of range\n     got: 0.0\n allowed: above 0\n"),
        (["HEALTHY", "--dual-clip", "nan"], "--dual-clip is out of range\n     got: nan\n"),
        (["HEALTHY", "--weights", "absent"], "no weights of versions"),
    ],
)
def test_bad_input_has_status_2_and_one_error(
    healthy: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    words = [str(healthy) if word == "HEALTHY" else word for word in words]
    assert run(["doctor", *words]) == REFUSED
    assert said in capsys.readouterr().err


def test_the_denominator_that_was_stated_is_held_against_the_weights(healthy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    statuses = {name: run(["doctor", str(healthy), "--denominator", name]) for name in ("token-mean", "sequence-mean")}
    assert sorted(statuses.values()) == [0, FAILED]
    assert "not those of the stated" in " ".join(capsys.readouterr().out.split())
