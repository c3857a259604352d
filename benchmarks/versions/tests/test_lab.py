"""The yardsticks beside the product's lab: walks, other codes of the same bytes, whole states."""

import pytest
import torch
import zstandard

from benchmarks.versions.bars import SLOW
from benchmarks.versions.lab import WALK, ComparedLab, module_of, zstd_xor
from benchmarks.versions.rows import Subject
from oldlogits.bench.chains import SyntheticModel
from oldlogits.bench.lab import WINDOW

NUM_PARAMS = 200_000
SUBJECT = Subject(model="synthetic", lr=SLOW, num_params=NUM_PARAMS)


@pytest.fixture(scope="module")
def measured() -> ComparedLab:
    lab = ComparedLab(SyntheticModel(num_params=NUM_PARAMS, lr=1e-6), SUBJECT, compare_every=5)
    for _ in range(WINDOW + 1):
        lab.round()
    return lab


def test_every_round_gives_a_sample_and_walks_begin_when_there_are_versions_to_walk(measured: ComparedLab):
    num = {row.quantity: row.num_samples for row in measured.rows()}
    rounds = WINDOW + 1
    assert num["bytes.cold"] == num["switch.memory"] == num["checkout"] == num["encode.cold"] == rounds
    assert num["walk.pass"] == num["walk.stops"] == rounds - WALK + 1
    assert num["window.copy"] == num["window.ewma"] == 2
    assert num["bytes.xor"] == num["bytes.entropy"] == num["bytes.of_xor"] == 2


def test_times_have_wall_times_beside_them_and_bytes_have_none(measured: ComparedLab):
    for row in measured.rows():
        assert (row.wall is None) == row.quantity.startswith(("bytes", "share", "window")), row.quantity
        assert row.low <= row.median <= row.high


def test_the_bytes_of_other_codes_are_those_of_the_same_versions(measured: ComparedLab):
    rows = {row.quantity: row for row in measured.rows()}
    assert rows["bytes.entropy"].median < rows["bytes.cold"].median < rows["bytes.xor"].median
    window = sum(measured.values["bytes.cold"][-WINDOW:])
    assert rows["window.copy"].high == pytest.approx(max(window, sum(measured.values["bytes.cold"][:WINDOW])), rel=1e-3)
    assert rows["window.ewma"].median == pytest.approx(rows["window.copy"].median / 2, rel=1e-6)
    assert rows["bytes.of_xor"].median == pytest.approx(rows["bytes.cold"].median / rows["bytes.xor"].median, rel=0.05)


def test_the_module_of_the_yardstick_takes_a_state_by_name():
    weights = {"model.layers.0.a.weight": torch.ones(2), "model.layers.1.a.weight": torch.zeros(3), "model.norm": torch.ones(1)}
    module = module_of(weights)
    assert set(module.state_dict()) == set(weights)
    module.load_state_dict({name: weight + 1 for name, weight in weights.items()})
    assert module.state_dict()["model.layers.1.a.weight"].tolist() == [1, 1, 1]
    assert weights["model.layers.1.a.weight"].tolist() == [0, 0, 0]


def test_xor_and_zstd_give_the_new_state_back():
    old, new = torch.randn(1000).bfloat16(), torch.randn(1000).bfloat16()
    flipped = torch.frombuffer(bytearray(zstandard.ZstdDecompressor().decompress(zstd_xor(old, new))), dtype=torch.int16)
    assert torch.equal((old.view(torch.int16) ^ flipped).view(torch.bfloat16), new)
    assert len(zstd_xor(old, old)) < 100
