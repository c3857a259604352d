"""Versions on a device: patches have the bytes that they have on the CPU, and every version comes back bit for bit."""

from __future__ import annotations

import pytest
import torch

from oldlogits.versions import FlatWeights, HostCopy, PatchStore, WeightAverage, apply, encode
from oldlogits.versions.patches.kernels_torch import TorchKernels

pytestmark = pytest.mark.gpu

SIZE = (300, 701)
"""Above what numba's kernels are used for on a CPU: bytes of two kinds of kernels are compared there, too."""


def chain(num: int) -> list[dict[str, torch.Tensor]]:
    """bf16 weights in which few values change, most do, or all bits do, NaN and infinity among them."""
    g = torch.Generator().manual_seed(0)
    states = [{"w": torch.randn(SIZE, generator=g).bfloat16(), "norm": torch.randn(701, generator=g).bfloat16()}]
    for i in range(1, num):
        new = {name: weight.clone() for name, weight in states[-1].items()}
        words = new["w"].view(torch.int16)
        chosen = torch.rand(SIZE, generator=g) < (0.01, 0.7, 1.0)[i % 3]
        words[chosen] += torch.randint(-300 if i % 2 else -1, 300, (int(chosen.sum()),), generator=g).to(torch.int16)
        new["norm"][i] = (float("nan"), float("inf"), -0.0)[i % 3]
        states.append(new)
    return states


def on(device, state):
    return {name: weight.to(device) for name, weight in state.items()}


def bits(state):
    return {name: weight.cpu().contiguous().view(torch.int16).view(-1).tolist() for name, weight in state.items()}


def patches_of(states, device):
    flat = FlatWeights.of(on(device, states[0]))
    return flat, [encode(flat, on(device, state)) for state in states[1:]]


def test_patches_have_the_bytes_of_the_cpus_kernels(device, monkeypatch):
    states = chain(4)
    _, expected = patches_of(states, torch.device("cpu"))
    monkeypatch.setattr("oldlogits.versions.patches.kernel_choice._numba", lambda: (TorchKernels(), "torch"))
    _, found = patches_of(states, device)
    for tier in ("memory", "cold"):
        assert [patch.to_bytes(tier) for patch in found] == [patch.to_bytes(tier) for patch in expected]


def test_patches_lead_there_and_back(device, monkeypatch):
    monkeypatch.setattr("oldlogits.versions.patches.kernel_choice._numba", lambda: (TorchKernels(), "torch"))
    states = chain(4)
    flat, patches = patches_of(states, device)
    apply(flat, patches, -1)
    assert bits(flat.weights) == bits(states[0])
    apply(flat, patches, 1)
    assert bits(flat.weights) == bits(states[-1])


def test_every_version_comes_back_bit_for_bit_and_stays_on_its_device(device):
    states = chain(6)
    store = PatchStore(hot=2)
    for version, state in enumerate(states):
        store.publish(version, on(device, state))
    for version in (4, 1, 5, 0, 3):
        with store.checkout(version) as weights:
            assert {weight.device.type for weight in weights.values()} == {device.type}
            assert bits(weights) == bits(states[version])
    store.verify()


def test_a_host_copy_follows_a_store_of_a_device(device, tmp_path):
    states = chain(4)
    store = PatchStore()
    for version, state in enumerate(states):
        store.publish(version, on(device, state))
    copy = HostCopy.create(tmp_path / "copy", on(device, states[0]), 0)
    copy.take([patch.to_bytes("memory") for patch in store.patch_between(0, 3)], 0, 3)
    with copy.read(3) as held:
        assert bits(held) == bits(states[3])


def test_the_average_of_the_weights_is_that_of_the_cpu(device):
    g = torch.Generator().manual_seed(1)
    masters = [{"a": torch.randn(50, 7, generator=g), "b": torch.randn(3, generator=g)} for _ in range(5)]
    here, there = WeightAverage(on(device, masters[0])), WeightAverage(masters[0])
    for state in masters[1:]:
        here.add(on(device, state), 0.8)
        there.add(state, 0.8)
    for name, weight in there.weights.items():
        torch.testing.assert_close(here.weights[name].cpu(), weight, rtol=1e-6, atol=1e-7)
