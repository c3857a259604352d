"""The head's log-probs on a device: our own operations against those of the CPU, and Liger's kernels against ours."""

from __future__ import annotations

import pytest
import torch

from oldlogits.models.head.kernel import liger_logps
from oldlogits.models.head.logits import LogitForm
from oldlogits.models.head.logps import HeadWork, token_logps

from ..models.test_head import FORMS, SHAPES, drawn, requiring

pytestmark = pytest.mark.gpu

NAMES = ("rows", "weight", "bias", "targets", "temperature")
BF16 = torch.bfloat16
IN_BF16 = LogitForm(weights=BF16, factors=BF16, sums=BF16, gradients=BF16)


def on(where, given, form, at_once, compute=token_logps):
    """Log-probs and gradients, on the CPU."""
    there = requiring({name: value.to(where) for name, value in given.items()})
    there["bias"] = there["bias"] if form.cap else None
    logps = compute(*(there[name] for name in NAMES), HeadWork(form=form, tokens_at_once=at_once))
    logps.backward(torch.linspace(-1, 1, len(logps), device=where))
    return logps.detach().cpu(), there["rows"].grad.float().cpu(), there["weight"].grad.cpu()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMS)
def test_log_probs_and_gradients_are_those_of_the_cpu(form, shape, device):
    num_tokens, num_words, at_once = SHAPES[shape]
    given = drawn(num_tokens, num_words)
    here, there = (on(where, given, FORMS[form], at_once) for where in (device, torch.device("cpu")))
    for found, expected in zip(here, there, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("form", [*FORMS, "bf16"])
def test_ligers_kernels_give_what_our_own_operations_give(form, device):
    pytest.importorskip("liger_kernel")
    if device.type == "cpu":
        pytest.skip("Triton compiles for GPUs; its interpreter: tests/models/test_head_kernel.py")
    form, tolerance = (IN_BF16, 0.02) if form == "bf16" else (FORMS[form], 1e-5)
    given = drawn(300, 2500)
    given["temperature"] = torch.ones(300) if form.cap or form is IN_BF16 else given["temperature"]
    found, expected = (on(device, given, form, 128, compute) for compute in (liger_logps, token_logps))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance * float(theirs.abs().max()))
