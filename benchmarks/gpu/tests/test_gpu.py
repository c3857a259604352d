"""The parts of `make gpu` that need no GPU; .ci/run plays the whole of it with small shapes."""

import argparse
import re
import tomllib
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.gpu import training
from benchmarks.gpu.__main__ import Part, play
from benchmarks.gpu.clock import Budget
from benchmarks.gpu.models import SHAPES, make_folder
from benchmarks.gpu.peaks import named_peak
from benchmarks.gpu.rows import HEADER, Row, Rows, lines_of, report

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "name, tflops",
    [
        ("NVIDIA H200", 989.4),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
    ],
)
def test_the_peak_of_a_device_is_that_of_the_longest_name_that_fits(name, tflops):
    assert named_peak(name).flops == pytest.approx(tflops * 1e12)


def test_a_device_that_is_not_in_the_table_has_no_named_peak():
    assert named_peak("Tesla T4") is None
    assert named_peak("NVIDIA A1000") is None


@pytest.mark.parametrize("name", ["tiny", "0.6b", "4b"])
def test_a_shape_counts_the_parameters_of_its_model_but_the_norms(name):
    shape = SHAPES[name]
    values = {key: getattr(shape, key) for key in shape.__dataclass_fields__}
    with torch.device("meta"):
        model = Qwen3ForCausalLM(Qwen3Config(**values, tie_word_embeddings=True))
    assert shape.num_parameters == sum(p.numel() for n, p in model.named_parameters() if "norm" not in n)


def test_a_token_takes_two_operations_a_parameter_and_its_share_of_attention_thrice_when_it_is_trained():
    shape = SHAPES["4b"]
    attention = 36 * 32 * 128 * 2 * 2 * 4096 / 2  # layers, heads, head size; scores and sum; two operations; half the length
    assert shape.flops(4096, trained=False) == pytest.approx(2 * shape.num_parameters + attention)
    assert shape.flops(4096, trained=True) == pytest.approx(3 * shape.flops(4096, trained=False))


def test_goals_are_shares_of_the_peak_or_bounds_of_the_figure():
    assert Row(name="train", value=1.0, of_peak=0.41, least=0.4).is_met is True
    assert Row(name="train", value=1.0, of_peak=0.39, least=0.4).is_met is False
    assert Row(name="switch", value=5.1, most=5.0).is_met is False
    assert Row(name="switch", value=5.0, most=5.0).is_met is True
    assert Row(name="left out", value=None, most=5.0).is_met is None
    assert Row(name="copy", value=5.0).is_met is None


def test_rows_fit_80_columns_and_show_what_was_missed(tmp_path):
    row = Row(
        name="score 0.6b, switch included", value=123_456.7, unit="tokens/s", of_peak=0.1234, least=0.5, note="word " * 40
    )
    shown = list(lines_of(row))
    assert shown[0] == f"{'score 0.6b, switch included':38}{'123,457 tokens/s':>18}{'12.3%':>9}{'>= 50%':>13} *"
    assert max(map(len, [HEADER, *shown])) <= 80
    rows = Rows(tmp_path / "rows.jsonl")
    rows.add(row)
    assert rows.read() == [row]
    assert report([row], {"device": "cpu"})["rows"][0]["is_met"] is False


def test_a_model_that_does_not_fit_gets_checkpoints_then_fewer_tokens_then_a_word(tmp_path, monkeypatch):
    folder = make_folder(tmp_path / "model", SHAPES["tiny"], CPU)

    def fitting(num_bytes):
        monkeypatch.setattr(training, "memory_of", lambda device: float(num_bytes))
        return training.fitting_recipe(folder, CPU, length=256, sequences=4, compute="fp32")

    whole = fitting(2**40)
    assert (whole.trainer.activation_checkpointing, whole.trainer.micro_batch_tokens) == (False, 1024)
    tight = [fitting(mib * 2**20) for mib in range(40, 5, -1)]
    shapes = [
        (one.trainer.activation_checkpointing, one.trainer.micro_batch_tokens) for one in tight if not isinstance(one, str)
    ]
    assert shapes == sorted(shapes, key=lambda s: (s[0], -s[1]))
    assert (True, 256) in shapes
    assert re.fullmatch(r"needs \d+ GiB, of 0", fitting(2**20))


def arguments(seconds):
    return argparse.Namespace(device="cpu", compute="bf16", model=None, seconds=seconds)


def test_a_part_that_takes_too_long_is_ended_and_said(tmp_path):
    assert not play(Part(name="large", least_s=1, most_s=1), arguments(0.2), tmp_path, Budget(1e6))
    (row,) = Rows(tmp_path / "rows.jsonl").read()
    assert (row.name, row.value) == ("cut: large", None)


def test_a_part_for_which_no_time_is_left_is_left_out_and_said(tmp_path):
    assert not play(Part(name="large", least_s=1, most_s=1), arguments(100), tmp_path, Budget(1))
    (row,) = Rows(tmp_path / "rows.jsonl").read()
    assert row.name == "left out: large"


def test_the_small_wheels_are_all_that_a_run_needs_beside_torch_and_transformers():
    brought = {"torch", "transformers", "safetensors", "numpy"}
    spared = {"pyarrow", "numba"}  # no token tables, and slower kernels on the CPU
    with (ROOT / "pyproject.toml").open("rb") as file:
        declared = tomllib.load(file)["project"]["dependencies"]
    needed = {re.split(r"[<>=;\s]", one)[0] for one in declared} - brought - spared
    small = re.search(r"^SMALL := (.*)$", (ROOT / "Makefile").read_text(), re.M).group(1).split()
    assert needed <= set(small)
