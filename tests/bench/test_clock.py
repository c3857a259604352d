"""Clocks tell the busy time of this thread from the time that passes; the machine says what it is."""

import time
from pathlib import Path

import pytest

from oldlogits.bench import machine
from oldlogits.bench.clock import Seconds, clock_of
from oldlogits.bench.machine import this_machine


def test_a_thread_that_sleeps_passes_time_and_one_that_works_is_busy(monkeypatch: pytest.MonkeyPatch):
    now = {"passed": 100.0, "worked": 7.0}
    monkeypatch.setattr(time, "perf_counter", lambda: now["passed"])
    monkeypatch.setattr(time, "thread_time", lambda: now["worked"])

    def sleep() -> None:
        now["passed"] += 3.0

    def work() -> None:
        now["passed"] += 2.0
        now["worked"] += 1.5

    assert clock_of("cpu")(sleep) == Seconds(busy_s=0.0, wall_s=3.0)
    assert clock_of("cpu")(work) == Seconds(busy_s=1.5, wall_s=2.0)


def test_real_work_keeps_the_thread_busy():
    assert clock_of("cpu")(lambda: sum(range(1_000_000))).busy_s > 0


def test_seconds_are_added_and_scaled_on_both_clocks():
    a, b = Seconds(busy_s=1, wall_s=2), Seconds(busy_s=0.5, wall_s=1)
    assert a + b == Seconds(busy_s=1.5, wall_s=3)
    assert a - b == b == a * 0.5


CPUINFO = """processor\t: 0
model name\t: A Processor
flags\t\t: fpu avx2 avx512f made_up avx512bw

processor\t: 1
model name\t: Another
flags\t\t: fpu
"""


def test_the_features_are_those_of_the_first_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "cpuinfo").write_text(CPUINFO, encoding="utf-8")
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    found = this_machine("cpu", "the kernels")
    assert (found.device, found.features, found.fast_path) == ("A Processor", ("avx2", "avx512f", "avx512bw"), "the kernels")
    assert found.num_cores >= 1
    assert "A Processor (avx2 avx512f avx512bw)" in str(found)
    assert str(found).endswith("kernels: the kernels")


def test_a_system_that_does_not_tell_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "missing")
    monkeypatch.delattr(machine.os, "getloadavg", raising=False)
    monkeypatch.delattr(machine.os, "sched_getaffinity", raising=False)
    found = this_machine("cpu", "torch")
    assert found.device
    assert (found.features, found.load) == ((), -1)
    assert "features unknown" in str(found)
    assert "load" not in str(found)
