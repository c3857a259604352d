"""Liger's kernels for the head against our own operations, run by Triton's interpreter, which cannot run its soft-caps."""

import os
import subprocess
import sys

import pytest
import torch

from oldlogits.core.errors import ConfigError
from oldlogits.models.head.kernel import use_kernel
from oldlogits.models.load import load_model

PLAYED = """
import torch
from tests.models.test_head import FORMS, drawn, ours, requiring
from oldlogits.models.head.kernel import liger_logps
from oldlogits.models.head.logps import HeadWork

cases = [(name, form, has_bias) for name, form in FORMS.items() for has_bias in (False, True) if not form.cap]
for name, form, has_bias in cases:
    given = drawn(6, 40)
    given["temperature"] = torch.ones(6) if has_bias else given["temperature"]
    given["bias"] = given["bias"] * has_bias
    left, right = requiring(given), requiring(given)
    left["bias"] = left["bias"] if has_bias else None
    entropy = torch.zeros(6)
    work = HeadWork(form=form, tokens_at_once=4, entropy=entropy)
    found = liger_logps(*(left[one] for one in ("rows", "weight", "bias", "targets", "temperature")), work)
    expected = ours(right, form, 4)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6, msg=name)
    assert entropy.isnan().all()
    counts = torch.linspace(-1, 1, 6)
    found.backward(counts)
    expected.backward(counts)
    for one in ("rows", "weight", "bias")[: 2 + has_bias]:
        scale = float(right[one].grad.abs().max())
        torch.testing.assert_close(left[one].grad, right[one].grad, rtol=0, atol=2e-6 * scale, msg=f"{name} {one}")
print("all equal")
"""


@pytest.mark.slow
def test_log_probs_and_gradients_of_each_token_are_those_of_our_own_operations():
    pytest.importorskip("liger_kernel")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    played = subprocess.run([sys.executable, "-c", PLAYED], capture_output=True, text=True, env=environment)
    assert played.stdout == "all equal\n", played.stderr


def test_a_trainer_that_finds_no_gpu_is_refused_before_it_scores_a_token(tiny_folder):
    with pytest.raises(ConfigError, match=r"needs a GPU.*fix: set trainer\.head_kernel"):
        use_kernel(load_model(tiny_folder), "liger", torch.device("cpu"))
