"""`oldlogits bench versions`: the command, its table and its figures."""

import json
from pathlib import Path

import pytest
import torch

from oldlogits.cli.bench import FIGURES
from oldlogits.cli.main import REFUSED, run

SMALL = ["bench", "versions", "--rounds", "2"]


def test_a_random_model_is_measured_at_every_learning_rate_and_the_figures_are_written(tmp_path: Path, capsys):
    out = tmp_path / "there" / "figures.json"
    assert run([*SMALL, "--params", "200000", "--lr", "1e-6", "1e-4", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "bytes of a version, compressed" in shown
    assert max(map(len, shown.splitlines())) <= 80
    figures = json.loads(out.read_text(encoding="utf-8"))["figures"]
    assert list(figures) == ["1e-06", "0.0001"]
    for found in figures.values():
        assert found.keys() == FIGURES.keys() - {"window.copy"}, "two rounds fill no window of ten"
    assert figures["1e-06"]["bytes.cold"] < figures["0.0001"]["bytes.cold"]


@pytest.mark.slow
def test_a_model_folder_is_measured_under_real_steps(chatml_llama: Path, capsys):
    assert run([*SMALL, "--model", str(chatml_llama), "--lr", "1e-3"]) == 0
    assert "at lr 0.001, 2 rounds" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    "words, said",
    [
        (["bench", "speed"], "unknown bench"),
        (["bench", "versions", "--params", "5"], "too little to measure"),
        (["bench", "versions", "--lr", "0"], "too little to measure"),
        (["bench", "versions", "--model", "nowhere"], "model.path is no folder"),
    ],
)
def test_a_wrong_command_is_refused(words: list[str], said: str, capsys):
    assert run(words) == REFUSED
    assert said in capsys.readouterr().err


def test_a_device_that_is_not_there_is_refused(capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run([*SMALL, "--device", "cuda"]) == REFUSED
    assert "there is no such device" in capsys.readouterr().err


def test_the_verb_alone_says_what_there_is(capsys):
    assert run(["bench"]) == 0
    assert "oldlogits bench versions" in capsys.readouterr().out
