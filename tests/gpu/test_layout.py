"""Attention in packed rows on a device: what its kernel gives is what a mask gives, forward and backward."""

from __future__ import annotations

import pytest
import torch

from oldlogits.models.layout.attention import Seen, attend, in_trees

from ..batch.test_trie import laid_out

pytestmark = pytest.mark.gpu

HEADS, KV_HEADS, DIM = 4, 2, 64
LISTS = [[1] * 150 + [2 + i] * (20 + i) for i in range(5)] + [[1] * 60 + [9] * 200, [8] * 90, [7]]


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_node_attends_to_all_above_it_and_to_itself_causally(device, dtype, window):
    made, _ = laid_out(LISTS)
    draw = torch.Generator().manual_seed(0)
    shapes = [(1, len(made.positions), heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    exact = [torch.randn(shape, generator=draw).to(dtype).float().to(device) for shape in shapes]
    weight = torch.randn((1, len(made.positions), HEADS, DIM), generator=draw).to(device)
    results = []
    for way, kind in ((in_trees, torch.float32), (attend, dtype)):
        given = [one.to(kind).transpose(1, 2).requires_grad_() for one in exact]
        found = way(*given, Seen(made, window), None)
        results.append([found.detach(), *torch.autograd.grad((found.float() * weight).sum(), given)])
    rounding = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    for expected, found in zip(*results, strict=True):
        assert float((found.float() - expected).abs().max()) <= rounding * float(expected.abs().max())
