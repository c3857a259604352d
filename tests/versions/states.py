"""States of a small model for the tests of the stores: of several dtypes, tied, with a buffer, any bits at all."""

import torch

SPECIAL = torch.tensor([0x7FC1, 0xFFC1 - 0x10000, 0x7F80, 0xFF80 - 0x10000, 0x8000 - 0x10000, 1, 0x7F81], dtype=torch.int16)
"""Bit patterns of bfloat16: NaNs with payloads, infinities, minus zero, a subnormal, a signalling NaN."""


def state(seed=0):
    """Tensors by name."""
    g = torch.Generator().manual_seed(seed)
    embedding = torch.randn(12, 5, generator=g).bfloat16()
    return {
        "embedding": embedding,
        "head": embedding,
        "norm": torch.randn(7, generator=g),
        "body": torch.randn(30, 50, generator=g).bfloat16(),
        "half": torch.randn(3, 4, generator=g).half().t(),
        "steps": torch.tensor(seed),
        "mask": torch.rand(9, generator=g) > 0.5,
        "none": torch.empty(0, 3),
    }


def changed(weights, seed, kind):
    """The next state: `kind` is "none", "sparse", "many", "dense" or "special"."""
    g = torch.Generator().manual_seed(seed)
    new = {name: tensor.clone() for name, tensor in weights.items()}
    flat = new["embedding"].view(torch.int16).view(-1)
    if kind == "sparse":
        flat[torch.randint(60, (2,), generator=g)] += 1
        new["norm"][torch.randint(7, (1,), generator=g)] *= 1.5
        new["steps"] += 1
    elif kind == "many":
        new["body"].view(torch.int16)[torch.rand(30, 50, generator=g) < 0.6] += 1
    elif kind == "special":
        flat[torch.randint(60, (7,), generator=g)] = SPECIAL
        new["mask"] = ~new["mask"]
    elif kind == "dense":
        new |= {name: tensor for name, tensor in state(seed + 1000).items() if name != "embedding"}
        flat.copy_(torch.randint(-(2**15), 2**15, (60,), generator=g).to(torch.int16))
    return new | {"head": new["embedding"]}


def history(kinds, seed=0):
    """The states of versions 0, 1, ...; the first is followed by one for each kind."""
    states = [state(seed)]
    for i, kind in enumerate(kinds):
        states.append(changed(states[-1], seed + i + 1, kind))
    return states


def assert_bits(found, expected):
    """The same names, shapes, dtypes and bits."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        word = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize]
        assert torch.equal(found[name].contiguous().view(-1).view(word), tensor.contiguous().view(-1).view(word)), name


def assert_holds(store, states):
    """The store has these versions, exactly; `states` by version."""
    assert store.versions == tuple(sorted(states))
    for version in store.versions:
        with store.checkout(version) as found:
            assert_bits(found, states[version])
