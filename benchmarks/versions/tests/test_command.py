"""The bench of versions: the command, its table and its figures."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.machine import Machine
from benchmarks.versions import measure as versions
from benchmarks.versions.__main__ import command, compared, held, remark
from benchmarks.versions.bars import ANY, figure, rate
from benchmarks.versions.document import markdown
from benchmarks.versions.measure import Plan
from benchmarks.versions.rows import Report, Row, Steps, Subject
from oldlogits.cli.main import attempt

MACHINE = Machine(device="a CPU", features=("avx2",), num_cores=2, load=0.5, fast_path="numba", software="Python")
ROWS = (
    Subject(model="synthetic", lr=1e-6, num_params=128_000_000).row("bytes.cold", [0.0065, 0.0066, 0.0067]),
    Subject(model="synthetic", lr=1e-5, num_params=128_000_000).row("bytes.cold", [0.04]),
    Subject(model="synthetic", lr=1e-6, num_params=128_000_000).row("cast", [2.0], [2.5]),
    Subject(model="synthetic", lr=ANY, num_params=128_000_000).row("ewma", [1.01], [1.02]),
    Subject(model="smollm2", lr=1e-6, num_params=135_000_000).row("bytes.of_xor", [0.5]),
)
REPORT = Report(
    machine=MACHINE,
    is_smoke=False,
    took_s=61.4,
    rows=ROWS,
    steps=(Steps(model="synthetic", lr=1e-6, shares=(0.01,), cold=(0.0066,)),),
)


def printed(report: Report) -> list[str]:
    console = Console(width=160, highlight=False, no_color=True)
    with console.capture() as capture:
        console.print(compared(report), held(report))
    return [" ".join(line.split()) for line in capture.get().splitlines() if line.strip()]


def test_figures_with_a_bar_say_whether_they_meet_it():
    lines = printed(REPORT)
    cold = "bytes of a version, cold tier / bf16 copy synthetic 128 M"
    assert f"{cold} 1e-6 0.660% 0.655% .. 0.665% 3 <= 0.700% met" in lines
    assert f"{cold} 1e-5 4.000% 1 <= 3.500% missed" in lines
    assert "EWMA update / fp32 copy synthetic 128 M 1.01 1.02 1 <= 1.05 met" in lines
    assert "the cast alone / memcpy synthetic 128 M 1e-6 2.00 2.50 1" in lines


def test_the_first_line_counts_bars_and_names_a_short_run():
    assert remark(REPORT) == "3 of 4 bars met, 61 s"
    short = Report(machine=MACHINE, is_smoke=True, took_s=9, rows=ROWS[:1], steps=())
    assert remark(short) == "1 of 1 bars met, 9 s; a short run: small model, few rounds, no real model"


@pytest.mark.parametrize(
    "value, unit, text",
    [(0.00673, "share", "0.673%"), (0.34, "share", "34.0%"), (0.8, "ratio", "0.80"), (14.52, "ms", "14.5 ms")],
)
def test_a_figure_is_written_in_its_unit(value: float, unit: str, text: str):
    assert figure(value, unit) == text


def test_learning_rates_are_written_short():
    assert [rate(lr) for lr in (1e-6, 5e-6, 1e-4, ANY)] == ["1e-6", "5e-6", "1e-4", ""]


def test_the_document_has_a_table_a_model_and_a_column_a_learning_rate():
    text = markdown(REPORT)
    assert text.startswith(
        "a CPU (avx2), one thread of 2 cores, load 0.5 at the start; Python; kernels: numba. 61 s; 3 of 4 bars met."
    )
    assert "| Synthetic steps, 128 M parameters | 1e-6 | 1e-5 |\n| --- | ---: | ---: |\n" in text
    assert "| bytes of a version, cold tier / bf16 copy | 0.660% (<= 0.700%) | 4.000% (**missed**: <= 3.500%) |" in text
    assert "| EWMA update / fp32 copy | 1.01 (<= 1.05) |  |" in text
    assert "| SmolLM2-135M-Instruct, real AdamW steps, 135 M parameters | 1e-6 |" in text


@pytest.mark.slow
def test_the_command_measures_and_writes_every_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "figures.json"
    assert attempt(command, ["--smoke", "--params", "200000", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "a short run" in shown
    assert "synthetic at lr 0.0001" in shown
    report = Report.read(out)
    measured = {(row.quantity, row.lr) for row in report.rows}
    assert {lr for name, lr in measured if name == "switch.memory"} == {1e-6, 5e-6, 1e-5, 1e-4}
    assert ("ewma", ANY) in measured
    assert {row.model for row in report.rows} == {"synthetic"}
    assert [len(steps.shares) for steps in report.steps] == [10, 10, 10, 10]
    assert all(row.num_samples >= 1 and row.num_params > 100_000 for row in report.rows)
    assert json.loads(out.read_text(encoding="utf-8"))["machine"]["fast_path"]


@pytest.mark.parametrize(
    "words, said",
    [
        (["--params", "5"], "too little to measure"),
        (["--document", "there/is/none.md"], "no place for the figures"),
    ],
)
def test_a_wrong_command_is_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    assert attempt(command, words) == 2
    assert said in capsys.readouterr().err


def test_a_device_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(versions.torch.cuda, "is_available", lambda: False)
    assert attempt(command, ["--device", "cuda"]) == 2
    assert "there is no such device" in capsys.readouterr().err


def test_the_full_plan_has_the_real_model_and_the_short_one_has_not():
    full, short = (Plan.of(is_smoke=is_smoke, device="cpu", num_params=None) for is_smoke in (False, True))
    assert (full.num_params, full.num_steps) == (128_000_000, 24)
    assert (short.num_params, short.num_steps) == (24_000_000, 0)
    assert full.total == 5 * full.num_rounds + 2 * full.num_steps


def test_rows_know_their_quantity():
    assert [row.of.name for row in ROWS] == [row.quantity for row in ROWS]
    assert isinstance(ROWS[0], Row)
