"""The lab measures what it says: exact versions, real bytes, every figure with a sample a round."""

import pytest
import torch
import zstandard

from oldlogits.bench import lab as lab_module
from oldlogits.bench.bars import SLOW
from oldlogits.bench.lab import WALK, WINDOW, Lab, module_of, zstd_xor
from oldlogits.bench.rows import Subject
from oldlogits.bench.synthetic import SyntheticModel
from oldlogits.versions import Patch

NUM_PARAMS = 200_000
SUBJECT = Subject(model="synthetic", lr=SLOW, num_params=NUM_PARAMS)


def source() -> SyntheticModel:
    return SyntheticModel(num_params=NUM_PARAMS, lr=1e-6)


@pytest.fixture(scope="module")
def measured() -> Lab:
    lab = Lab(source(), SUBJECT, compare_every=5)
    for _ in range(WINDOW + 1):
        lab.round()
    return lab


@pytest.mark.slow
def test_every_round_gives_a_sample_and_walks_begin_when_there_are_versions_to_walk(measured: Lab):
    num = {row.quantity: row.num_samples for row in measured.rows()}
    rounds = WINDOW + 1
    assert num["bytes.cold"] == num["switch.memory"] == num["checkout"] == num["encode.cold"] == rounds
    assert num["walk.pass"] == num["walk.stops"] == rounds - WALK + 1
    assert num["window.copy"] == num["window.ewma"] == 2
    assert num["bytes.xor"] == num["bytes.entropy"] == num["bytes.of_xor"] == 2


def test_times_have_wall_times_beside_them_and_bytes_have_none(measured: Lab):
    for row in measured.rows():
        assert (row.wall is None) == row.quantity.startswith(("bytes", "share", "window")), row.quantity
        assert row.low <= row.median <= row.high


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
    assert measured.shares == pytest.approx(shares, rel=1e-12)
    rows = {row.quantity: row for row in measured.rows()}
    assert rows["bytes.entropy"].median < rows["bytes.cold"].median < rows["bytes.xor"].median
    window = sum(measured.cold_shares[-WINDOW:])
    assert rows["window.copy"].high == pytest.approx(max(window, sum(measured.cold_shares[:WINDOW])), rel=1e-3)
    assert rows["window.ewma"].median == pytest.approx(rows["window.copy"].median / 2, rel=1e-6)
    assert rows["bytes.of_xor"].median == pytest.approx(rows["bytes.cold"].median / rows["bytes.xor"].median, rel=0.05)


def test_the_chain_ends_at_the_masters_bits(monkeypatch: pytest.MonkeyPatch):
    seen: list[Patch] = []
    encode = lab_module.encode
    monkeypatch.setattr(lab_module, "encode", lambda *args: seen.append(encode(*args)) or seen[-1])
    model = source()
    lab = Lab(model, SUBJECT, compare_every=9)
    for _ in range(WALK):
        lab.round()
    assert len(seen) == 2 * WALK
    assert [patch.target for patch in seen[::2]] == [patch.target for patch in seen[1::2]]
    for name, weight in lab.resident.weights.items():
        assert torch.equal(weight, model.masters[name].bfloat16())
    assert lab.resident.full_digest() == seen[-1].target


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
