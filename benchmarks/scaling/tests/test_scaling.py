"""`python -m benchmarks.scaling`: its runs, its clocks, and what it makes of them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.machine import Machine
from benchmarks.scaling import __main__ as bench_scaling
from benchmarks.scaling import measure as scaling
from benchmarks.scaling.measure import Cpu, Measured, Report, Setting, Workload, measure, read_cpu, settings
from oldlogits.cli.main import REFUSED, attempt
from oldlogits.config.check import check
from oldlogits.config.load import config_from_table
from oldlogits.core.errors import ConfigError, WorkerDiedError
from order_desk.slow import SlowOrderDesk

MACHINE = Machine(device="a CPU", features=("avx2",), num_cores=2, load=0.5, fast_path="not used", software="Python")
LOCAL = Setting(runtime="local", workers=1)


def ray(workers: int) -> Setting:
    return Setting(runtime="ray", workers=workers)


def measured(setting: Setting, rate: float, cpu_share: float = 0.4) -> Measured:
    return Measured(setting=setting, trajectories_per_s=rate, cpu_share=cpu_share, staleness_mean=0.5, seconds_s=60.0)


def report_of(*runs: Measured) -> Report:
    return Report(machine=MACHINE, workload=Workload(), runs=runs)


def test_local_and_one_worker_take_turns_and_more_workers_run_once():
    assert settings((8, 1, 2, 2), rounds=2) == [LOCAL, ray(1), LOCAL, ray(1), ray(2), ray(8)]
    assert settings((), rounds=1) == [LOCAL]
    assert settings((4,), rounds=1) == [LOCAL, ray(4)]


@pytest.mark.parametrize("workers, rounds", [((1, 2), 0), ((0,), 1), ((1, -2), 5)])
def test_nothing_to_run_is_refused(workers: tuple[int, ...], rounds: int):
    with pytest.raises(ConfigError, match="nothing to run"):
        settings(workers, rounds)


@pytest.mark.parametrize(
    "wrong", [{"latency_s": 0.0}, {"groups": 0}, {"group_size": 1}, {"num_updates": 0}, {"timeout_s": -1.0}]
)
def test_a_workload_that_is_none_is_refused(wrong: dict[str, float]):
    with pytest.raises(ConfigError, match="out of range"):
        Workload(**wrong)


def test_a_recipe_has_the_same_work_for_each_worker(tmp_path: Path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    workload = Workload(groups=3, group_size=2, num_updates=5)
    config = config_from_table(workload.recipe(LOCAL, rows, seed=4))
    check(config)
    assert (config.num_updates, config.seed, config.env.train_data) == (7, 4, str(rows))
    assert (config.rollout.prompts_per_update, config.rollout.max_running_groups) == (3, 3)
    of_four = workload.recipe(ray(4), rows, seed=4)
    assert of_four["rollout"] == {"group_size": 2, "prompts_per_update": 12, "max_running_groups": 12}
    assert (of_four["runtime"], of_four["ray"]) == ({"type": "ray"}, {"num_workers": 4})


def test_shares_are_of_medians_and_of_k_times_one_worker():
    """Medians: local 2, one worker 1.9; four workers 6.08 = 0.8 x 4 x 1.9, eight 12.0 = 0.789 x 8 x 1.9."""
    runs = [measured(LOCAL, rate) for rate in (2.0, 1.0, 9.0)] + [measured(ray(1), rate) for rate in (1.9, 1.8, 2.5)]
    local, one, four, eight = report_of(*runs, measured(ray(4), 6.08), measured(ray(8), 12.0)).verdicts
    assert (local.setting, local.bar, local.is_met) == (LOCAL, None, None)
    assert (one.share, one.bar, one.is_met) == (pytest.approx(0.95), 0.9, True)
    assert (four.share, four.bar) == (pytest.approx(0.8), 0.8)
    assert (eight.share, eight.is_met) == (pytest.approx(12 / 15.2), False)


def test_no_bar_holds_while_the_cpu_is_what_counts():
    runs = (measured(LOCAL, 2.0), measured(ray(1), 1.0, cpu_share=0.8), measured(ray(2), 1.0, cpu_share=0.79))
    _, one, two = report_of(*runs).verdicts
    assert (one.bar, one.is_met) == (None, None)
    assert (two.bar, two.is_met) == (0.8, False)
    unknown = report_of(measured(LOCAL, 2.0), measured(ray(1), 1.9, cpu_share=math.nan)).verdicts[1]
    assert unknown.is_met is True


def test_without_what_it_is_compared_with_a_setting_has_no_share():
    local, four = report_of(measured(LOCAL, 2.0), measured(ray(4), 6.0)).verdicts
    assert math.isnan(four.share)
    assert (local.is_met, four.is_met) == (None, None)


def test_a_report_is_read_as_it_was_written(tmp_path: Path):
    report = report_of(measured(LOCAL, 2.0), measured(ray(2), 3.5))
    report.write(tmp_path / "figures.json")
    assert Report.read(tmp_path / "figures.json") == report


def test_the_busy_share_is_that_between_two_readings(tmp_path: Path):
    """user 100, nice 50, system 30, idle 800, iowait 20, irq 0, softirq 5, steal 15; guest time is in user already."""
    stat = tmp_path / "stat"
    stat.write_text("cpu  100 50 30 800 20 0 5 15 99 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n", encoding="ascii")
    before = read_cpu(stat)
    assert before == Cpu(busy=200, total=1020)
    stat.write_text("cpu  160 50 30 820 40 0 5 15 99 0\n", encoding="ascii")
    assert read_cpu(stat).share_since(before) == pytest.approx(0.6)
    nothing = read_cpu(tmp_path / "none")
    assert math.isnan(nothing.share_since(nothing))


def test_the_table_says_what_is_compared_and_which_bar_is_missed():
    report = report_of(measured(LOCAL, 2.0), measured(ray(1), 1.7), measured(ray(2), 3.4, cpu_share=0.9))
    console = Console(width=140, no_color=True)
    with console.capture() as capture:
        bench_scaling.show(console, report, markdown=True)
    lines = capture.get().splitlines()
    assert lines[0].startswith("a CPU (avx2), 2 cores, load 0.5")
    assert "| local | 1 | 2.00 | 2.00 .. 2.00 |  |  | 40% | 0.50 |  |" in lines
    assert "| ray, 1 worker | 1 | 1.70 | 1.70 .. 1.70 | local | 0.85 | 40% | 0.50 | >= 0.9 missed |" in lines
    assert "| ray, 2 workers | 1 | 3.40 | 3.40 .. 3.40 | 2 x ray, 1 worker | 1.00 | 90% | 0.50 | none: CPU >= 80% |" in lines


@pytest.mark.parametrize("rate, status", [(1.9, 0), (1.7, 1)])
def test_the_exit_status_says_whether_a_bar_is_missed(rate, status, tmp_path: Path, monkeypatch, capsys):
    asked: list[tuple[Workload, list[Setting]]] = []

    def fake(workload, order, folder, on_start):
        asked.append((workload, list(order)))
        return report_of(measured(LOCAL, 2.0), measured(ray(1), rate))

    monkeypatch.setattr(bench_scaling, "measure", fake)
    out = tmp_path / "figures.json"
    words = ["--workers", "1", "--rounds", "1", "--workload.latency-s", "0.5", "--out", str(out)]
    assert attempt(bench_scaling.command, words) == status
    assert asked == [(Workload(latency_s=0.5), [LOCAL, ray(1)])]
    assert Report.read(out).verdicts[1].share == pytest.approx(rate / 2)
    assert "ray, 1 worker" in capsys.readouterr().out


def test_a_wrong_option_is_refused(capsys):
    assert attempt(bench_scaling.command, ["--rounds", "0"]) == REFUSED
    assert "nothing to run" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_that_fails_is_told_with_its_last_words(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(Workload, "recipe", lambda self, setting, rows, seed: {"trainer": {"lr": -1.0}})
    with pytest.raises(WorkerDiedError, match=r"a run of the bench failed \(local\).*trainer\.lr.*00-local-1\.log"):
        measure(Workload(), [LOCAL], tmp_path, lambda number, setting: None)


@pytest.mark.slow
def test_a_run_that_takes_too_long_is_ended(tmp_path: Path, monkeypatch):
    started: list[int] = []
    spawn = scaling.subprocess.Popen

    def remembered(*args, **kwargs):
        process = spawn(*args, **kwargs)
        started.append(process.pid)
        return process

    monkeypatch.setattr(scaling.subprocess, "Popen", remembered)
    with pytest.raises(WorkerDiedError, match=r"no end after 0\.3 s"):
        measure(Workload(timeout_s=0.3), [LOCAL], tmp_path, lambda number, setting: None)
    [pid] = started
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.slow
def test_what_ended_after_the_warm_up_is_counted(tmp_path: Path):
    workload = replace(Workload(), latency_s=0.05, groups=2, num_updates=3)
    said: list[tuple[int, Setting]] = []
    report = measure(workload, [LOCAL], tmp_path, lambda number, setting: said.append((number, setting)))
    [run] = report.runs
    assert said == [(0, LOCAL)]
    num_ended = run.trajectories_per_s * run.seconds_s
    assert num_ended == pytest.approx(round(num_ended))
    assert 0 < num_ended <= 5 * 2 * 2  # at most those of the run: updates x groups x episodes
    assert 0 <= run.cpu_share <= 1
    row = json.loads((tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()[5])
    assert row == {**SlowOrderDesk.make_row("train", 5), "latency_s": 0.05}
