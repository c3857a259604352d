"""What is compiled before the first update needs it."""

import importlib

import pytest
import torch

from oldlogits.versions import PatchStore, begin_numba, warm_up
from oldlogits.versions.patches.kernel_choice import FEW, kernels_in_use

from ..waiting import HUNG_S

COMPILED = ("encode_blocks", "apply_blocks", "digest_of")


@pytest.mark.slow
@pytest.mark.skipif("numba on" not in kernels_in_use(), reason="there is no numba")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_after_the_warm_up_storing_and_taking_up_a_version_compiles_nothing(dtype):
    compiled = importlib.import_module("oldlogits.versions.patches.compiled")
    weights = {"a": torch.zeros(FEW + 5, 2), "b": torch.ones(3)}
    thread = warm_up(weights, dtype)
    thread.join(HUNG_S)
    assert not thread.is_alive()
    signatures = {name: list(getattr(compiled, name).signatures) for name in COMPILED}
    assert signatures["encode_blocks"]
    store = PatchStore(dtype=dtype)
    store.publish(0, weights)
    weights["a"][7:900] += 1.5
    store.publish(1, weights)
    with store.checkout(0) as found:
        assert float(found["a"].abs().sum()) == 0.0
    assert {name: list(getattr(compiled, name).signatures) for name in COMPILED} == signatures


def test_a_few_weights_start_no_compiler():
    assert warm_up({"a": torch.zeros(FEW - 1)}) is None
    assert begin_numba({"a": torch.zeros(FEW - 1)}) is None
