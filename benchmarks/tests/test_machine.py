"""The machine says what it is."""

from pathlib import Path

import pytest

from benchmarks import machine
from benchmarks.machine import this_machine

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
