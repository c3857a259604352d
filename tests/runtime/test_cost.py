"""What a dry run says of bytes, against what the parts hold when they are made."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import AutoConfig

from oldlogits.batch import TokenBatch
from oldlogits.config import config_from_table
from oldlogits.policy.mixed import MixedForward
from oldlogits.policy.model import load_model
from oldlogits.runtime.cost import estimate
from oldlogits.train.engine_view import EngineView

from ..builders import batch_of, sampled, trajectory
from ..rollout.reference import make_model, save
from ..runs import recipe


@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen3 top-1 of 4 experts"])
@pytest.mark.parametrize("numerics", ["fp32", "bf16", "int4"])
def test_the_view_of_the_engine_is_a_copy_with_a_head_of_its_own_and_none_for_fp32(name, numerics, tmp_path):
    model = make_model(name)
    cost = estimate(config_from_table({"model": {"path": str(save(model, tmp_path))}, "engine": {"numerics": numerics}}))
    held = 0 if numerics == "fp32" else sum(p.nbytes for p in EngineView(model, numerics).model.parameters())
    assert cost.view_bytes == held
    assert cost.weights_bytes == sum(p.nbytes for p in model.parameters())
    assert any(f"{held / 2**20:,.1f} MiB: the trainer's copy" in line for line in cost.lines())


def test_the_tiny_model_has_a_tied_head():
    cost = estimate(config_from_table({"engine": {"numerics": "fp8"}}))
    assert 0 < cost.view_bytes - cost.weights_bytes < cost.weights_bytes


STALE = {"engine": {"kv": "stale"}, "source": {"accept_mixed_kv": True}}


def test_the_mixed_forward_holds_at_most_what_is_said(tiny_folder):
    config = recipe(tiny_folder, **STALE)
    num, longest = config.rollout.groups_per_version * config.rollout.group_size, config.env.max_tokens
    worst = [worst_trajectory(i, longest, config.window) for i in range(num)]
    assert entries_bytes(tiny_folder, batch_of(worst)) <= estimate(config).mixed_bytes
    assert entries_bytes(tiny_folder, batch_of(worst)) > estimate(config).mixed_bytes / 2
    assert estimate(recipe(tiny_folder)).mixed_bytes == 0


def worst_trajectory(number: int, length: int, num_updates: int):
    """Each update is within a turn, and the next turn has lost its entries."""
    segments = [[3] * (length - 3 * num_updates)]
    for version in range(num_updates):
        segments += [[4], sampled([5], version), sampled([6], version + 1, kv="mixed")]
    return trajectory(*segments, id=f"g0.{number}")


def entries_bytes(folder, batch: TokenBatch) -> int:
    """Of all chains, keys and values of every layer in fp32."""
    config = AutoConfig.from_pretrained(folder)
    forward = MixedForward(load_model(folder), batch, micro_batch_tokens=4096, head_chunk_tokens=16)
    chains, longest = forward._entries._shape
    return int(np.prod([chains, longest, config.num_hidden_layers, config.num_key_value_heads, config.head_dim])) * 2 * 4
