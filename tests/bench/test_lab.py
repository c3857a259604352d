"""The lab measures what it says: exact versions, real bytes, every figure with a sample a round."""

import pytest
import torch

from oldlogits.bench import lab as lab_module
from oldlogits.bench.chains import SyntheticModel
from oldlogits.bench.lab import WINDOW, Lab, time_busy
from oldlogits.versions import Patch

NUM_PARAMS = 200_000


def source() -> SyntheticModel:
    return SyntheticModel(num_params=NUM_PARAMS, lr=1e-6)


@pytest.fixture(scope="module")
def measured() -> Lab:
    lab = Lab(source())
    for _ in range(WINDOW + 1):
        lab.round()
    return lab


@pytest.mark.slow
def test_every_round_gives_a_sample_and_windows_begin_when_they_are_full(measured: Lab):
    rounds = WINDOW + 1
    assert {len(times) for times in measured.times.values()} == {rounds}
    assert set(measured.times) == {"memcpy", "cast", "encode", "pack", "switch", "switch.cold", "publish", "checkout"}
    assert {name: len(values) for name, values in measured.values.items()} == {
        "share.changed": rounds,
        "bytes.cold": rounds,
        "bytes.memory": rounds,
        "window.copy": 2,
    }


def test_the_bytes_are_those_of_patches_of_the_same_chain(measured: Lab):
    """Independent: the chain again, its bf16 states compared without the codec."""
    model = source()
    before = torch.cat([model.masters[name].bfloat16().flatten() for name in sorted(model.masters)])
    shares = []
    for _ in range(WINDOW + 1):
        model.step()
        after = torch.cat([model.masters[name].bfloat16().flatten() for name in sorted(model.masters)])
        shares.append((before.view(torch.int16) != after.view(torch.int16)).double().mean().item())
        before = after
    assert measured.values["share.changed"] == pytest.approx(shares, rel=1e-12)
    cold = measured.values["bytes.cold"]
    windows = [sum(cold[i : i + WINDOW]) for i in range(2)]
    assert measured.values["window.copy"] == pytest.approx(windows, rel=1e-12)


def test_the_chain_ends_at_the_masters_bits(monkeypatch: pytest.MonkeyPatch):
    seen: list[Patch] = []
    encode = lab_module.encode
    monkeypatch.setattr(lab_module, "encode", lambda *args: seen.append(encode(*args)) or seen[-1])
    model = source()
    lab = Lab(model)
    for _ in range(4):
        lab.round()
    assert len(seen) == 2 * 4
    assert [patch.target for patch in seen[::2]] == [patch.target for patch in seen[1::2]]
    for name, weight in lab.resident.weights.items():
        assert torch.equal(weight, model.masters[name].bfloat16())
    assert lab.resident.full_digest() == seen[-1].target


def test_work_that_is_timed_is_run_once_and_gives_its_result_and_the_threads_cpu_time(monkeypatch: pytest.MonkeyPatch):
    ticks = iter([7.0, 7.25])
    monkeypatch.setattr(lab_module.time, "thread_time", lambda: next(ticks))
    runs: list[str] = []
    assert time_busy(lambda: runs.append("now") or "done", torch.device("cpu")) == ("done", 0.25)
    assert runs == ["now"]


def test_of_work_that_a_round_does_several_times_the_median_is_kept(monkeypatch: pytest.MonkeyPatch):
    seconds = iter([5.0, 1.0, 2.0])
    monkeypatch.setattr(lab_module, "time_busy", lambda work, device: (work(), next(seconds)))

    class Short(Lab):
        def measure(self):
            for _ in range(3):
                self.memcpy()

    lab = Short(source())
    lab.round()
    assert lab.times == {"memcpy": [2.0]}
