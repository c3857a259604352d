"""The embedded engine on a device samples what it samples on the CPU, over updates of the weights, whatever becomes of KV."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from oldlogits.core.engine import EngineSpec, Sampling
from oldlogits.engines.embedded.engine import EngineCore
from oldlogits.engines.embedded.grouped import _by_group
from oldlogits.engines.embedded.numerics import round_linear
from oldlogits.models.adapters import A_SUFFIX, B_SUFFIX
from oldlogits.models.load import load_model, named_weights

pytestmark = pytest.mark.gpu


def spec_of(folder, device, **changes) -> EngineSpec:
    spec = EngineSpec(model_path=str(folder), max_num_seqs=40, max_context=128, seed=3, device=device.type)
    return replace(spec, **changes)


def requests(core, name: str) -> None:
    """Of several lengths, with shared beginnings, sampled, greedy and of a restricted support."""
    rng = random.Random(name)
    shared = [rng.randrange(9, 29) for _ in range(40)]
    for i in range(36):
        prompt = [*shared, *(rng.randrange(9, 29) for _ in range(i % 5 + 1))] if i % 2 else shared[: i + 1]
        core.add(f"{name}/{i}", prompt, Sampling(max_tokens=8 + i, temperature=(1.0, 0.7, 0.0)[i % 3], top_k=5 * (i % 4 == 3)))


def play(core, new, kv):
    """Sample, change the weights on the way, sample on with requests that find the cache warm; ended requests by name."""
    found = {}
    requests(core, "a")
    for _ in range(10):
        found.update(core.step())
    core.pause("keep", kv)
    core.update_weights(new, 1)
    core.resume()
    requests(core, "b")
    while not core.idle:
        found.update(core.step())
    return found


def moved(folder):
    """The next weights of a model."""
    generator = torch.Generator().manual_seed(5)
    weights = named_weights(load_model(folder))
    return {name: w + 0.02 * torch.randn(w.shape, generator=generator) for name, w in weights.items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, one in expected.items():
        assert (found[name].output_ids, found[name].spans) == (one.output_ids, one.spans), name
        np.testing.assert_allclose(found[name].logprobs, one.logprobs, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kv", ["recompute", "stale"])
def test_tokens_versions_and_log_probs_are_those_of_the_cpu(tiny_folder, device, kv):
    new = moved(tiny_folder)
    expected = play(EngineCore(spec_of(tiny_folder, torch.device("cpu"))), new, kv)
    core = EngineCore(spec_of(tiny_folder, device))
    core.decode_step.has_few_shapes = True
    assert_same(play(core, {name: weight.to(device) for name, weight in new.items()}, kv), expected)


@pytest.mark.parametrize("numerics", ["bf16", "int4", "fp8_dynamic"])
def test_emulated_numerics_round_alike(tiny_folder, device, numerics):
    weight = torch.randn(64, 48, generator=torch.Generator().manual_seed(1))
    assert torch.equal(round_linear(weight.to(device), numerics).cpu(), round_linear(weight, numerics))
    prompt = [3, 9, 10, 11, 12, 2, 4, 13]

    def probe(on):
        core = EngineCore(spec_of(tiny_folder, on, numerics=numerics))
        core.add("p", prompt, Sampling(max_tokens=1, prompt_logprobs=True))
        ((_, generation),) = core.step()
        return generation.prompt_logprobs

    np.testing.assert_allclose(
        probe(device), probe(torch.device("cpu")), rtol=0, atol=0.1 if numerics == "fp8_dynamic" else 1e-4
    )


@pytest.mark.slow
def test_replayed_graphs_give_what_the_same_kernels_give_one_by_one(tiny_folder, device):
    new = moved(tiny_folder)
    cores = [EngineCore(spec_of(tiny_folder, device)) for _ in range(2)]
    for core in cores:
        core.decode_step.has_few_shapes = True
    cores[0].decode_step.is_captured = False
    assert cores[1].decode_step.is_captured == (device.type == "cuda")
    assert_same(play(cores[1], new, "recompute"), play(cores[0], new, "recompute"))


@pytest.mark.slow
def test_experts_serve_the_same_tokens_on_a_device(tiny_moe_folder, device):
    new = moved(tiny_moe_folder)
    expected = play(EngineCore(spec_of(tiny_moe_folder, torch.device("cpu"))), new, "recompute")
    assert_same(play(EngineCore(spec_of(tiny_moe_folder, device)), new, "recompute"), expected)


def test_products_of_experts_one_by_one_are_the_grouped_ones(device):
    generator = torch.Generator().manual_seed(0)
    rows, weights = torch.randn(11, 8, generator=generator), torch.randn(4, 8, 12, generator=generator)
    ends = torch.tensor([3, 3, 10, 11], dtype=torch.int32)
    found = _by_group(rows.to(device), weights.to(device), ends.to(device)).cpu()
    torch.testing.assert_close(found, F.grouped_mm(rows, weights, offs=ends), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_adapters_are_merged_on_the_device(tiny_folder, device):
    layer = "model.layers.0.self_attn.q_proj"
    generator = torch.Generator().manual_seed(2)
    adapters = {
        layer + A_SUFFIX: 0.1 * torch.randn(4, 32, generator=generator),
        layer + B_SUFFIX: torch.randn(32, 4, generator=generator),
    }
    cpu = torch.device("cpu")
    played = [play(EngineCore(spec_of(tiny_folder, on, adapter_scale=0.5)), adapters, "recompute") for on in (device, cpu)]
    assert_same(*played)
