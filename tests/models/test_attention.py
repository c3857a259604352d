"""Attention in a packed row against attention in each sequence alone, in float64."""

import inspect
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.varlen import varlen_attn

from oldlogits.models.layout import attention
from oldlogits.models.layout.attention import Seen, attend, in_trees

from ..batch.test_trie import forests, laid_out

HEADS, KV_HEADS, DIM = 4, 2, 8


def alone(query, key, value, window):
    """[head, token, dim] of one sequence, by the definition."""
    n = query.shape[1]
    key, value = (one.repeat_interleave(HEADS // KV_HEADS, 0) for one in (key, value))
    back = torch.arange(n)[:, None] - torch.arange(n)
    hidden = (back < 0) | (back >= (window or n + 1))
    return ((query @ key.mT) / DIM**0.5).masked_fill(hidden, -torch.inf).softmax(-1) @ value


def compared(lists, window, way, dtype):
    """The largest errors of the output and of each gradient, and the scale of each."""
    made, rows = laid_out(lists)
    draw = torch.Generator().manual_seed(len(made.positions))
    shapes = [(1, len(made.positions), heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    given = [torch.randn(shape, generator=draw).to(dtype).transpose(1, 2).requires_grad_() for shape in shapes]
    exact = [one.detach().double().requires_grad_() for one in given]
    found = way(*given, Seen(made, window), None)
    wanted, weight = torch.zeros(found.shape, dtype=torch.float64), torch.randn(found.shape, generator=draw)
    total = torch.zeros((), dtype=torch.float64)
    for place in map(torch.from_numpy, rows.values()):
        out = alone(*(one[0, :, place] for one in exact), window).transpose(0, 1)
        wanted[0, place] = out.detach()
        total = total + (out * weight[0, place]).sum()
    times = torch.zeros(found.shape[1])
    for place in rows.values():
        times[place] += 1
    grads = torch.autograd.grad((found.float() * weight * times[:, None, None]).sum(), given)
    pairs = [(found, wanted), *zip(grads, torch.autograd.grad(total, exact), strict=True)]
    return [(float((a.detach().double() - b).abs().max()), float(b.abs().max())) for a, b in pairs]


def of_unequal_lengths(query, key, value, queries, keys, most_queries, most_keys, **options):
    """What torch says of its kernel for GPUs: each run attends causally, its last query to its last key."""
    inspect.signature(varlen_attn).bind(query, key, value, queries, keys, most_queries, most_keys, **options)
    left, right = options["window_size"]
    assert right == 0
    assert options.get("enable_gqa", False) == (query.shape[1] != key.shape[1])
    found = []
    for (a, b), (c, d) in zip(pairwise(queries.tolist()), pairwise(keys.tolist()), strict=True):
        assert b - a <= most_queries
        assert d - c <= most_keys
        back = torch.arange(d - c - (b - a), d - c)[:, None] - torch.arange(d - c)
        is_seen = (back >= 0) & (back <= (left if left >= 0 else d))
        runs = (one.transpose(0, 1) for one in (query[a:b], key[c:d], value[c:d]))
        out = torch.nn.functional.scaled_dot_product_attention(
            *runs, attn_mask=is_seen, scale=options["scale"], enable_gqa=True
        )
        found.append(out.transpose(0, 1))
    return torch.cat(found)


def in_runs(*given):
    """What GPUs compute in half precision, with the kernel as torch describes it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "varlen_attn", of_unequal_lengths)
        return attention._in_runs(*given)


def in_runs_of_equal_heads(*given):
    """The same where the kernel takes no groups of heads, as in torch 2.11."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "_TAKES_GROUPS", False)
        return in_runs(*given)


@settings(max_examples=80)
@given(forests(), st.sampled_from([None, 1, 3, 17]), st.sampled_from([attend, in_trees, in_runs, in_runs_of_equal_heads]))
def test_tokens_of_a_packed_row_attend_as_each_sequence_does_alone_and_gradients_of_shared_ones_add_up(lists, window, way):
    errors, scales = zip(*compared(lists, window, way, torch.float32), strict=True)
    assert errors[0] <= 1e-6 * max(scales[0], 1.0)
    assert max(errors[1:]) <= 1e-6 * max(scales[1:])


@pytest.mark.parametrize("window", [None, 17])
def test_in_bf16_what_is_added_up_is_rounded_once(window):
    lists = [[1] * 60 + [2, 3] * i for i in range(6)] + [[1] * 30 + [4] * 20]
    for error, scale in compared(lists, window, attend, torch.bfloat16):
        assert error <= 2**-7 * max(scale, 1.0)


def test_a_window_that_no_sequence_passes_hides_nothing():
    made, _ = laid_out([[1] * 9, [1] * 4 + [2] * 5])
    assert Seen(made, 9).window is None
    assert Seen(made, 8).window == 8


def test_what_follows_a_shared_run_reads_it_at_once_and_nodes_of_one_size_are_computed_together():
    made, _ = laid_out([[1] * 40 + [2 + i] * 9 for i in range(5)])
    own, below = Seen(made, None).blocks(torch.float32)
    assert [(b.queries, b.count, b.mask) for b in own] == [(slice(0, 40), 1, None), (slice(40, 85), 5, None)]
    assert [(b.queries, b.keys, b.mask) for b in below] == [(slice(40, 85), slice(0, 40), None)]


def test_the_runs_of_a_kernel_for_unequal_lengths_are_the_tokens_that_stand_above_each_node():
    made, rows = laid_out([[1] * 20 + [2, 3], [1] * 20 + [4], [5]])
    queries, keys, which = (one.tolist() for one in Seen(made, None).runs(torch.device("cpu")))
    assert [which[a:b] for a, b in pairwise(keys)] == [
        list(range(20)),
        rows[0].tolist(),
        rows[1].tolist(),
        rows[2].tolist(),
    ]
    assert queries == [0, *np.cumsum(made.sizes).tolist()]
