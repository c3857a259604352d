"""Liger's kernels for the head, on GPUs. The one file that imports liger_kernel.

They form the logits of all words for some tokens, in the type of hidden states and weights, and turn them into log-probs and
gradients in one kernel, where torch takes a pass over memory for each operation. They give no entropy.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers import PreTrainedModel

from oldlogits.core.errors import ConfigError
from oldlogits.models.head.logps import HeadWork


def use_kernel(model: PreTrainedModel, name: str, device: torch.device) -> None:
    """Let the head of a model that will be on a device compute log-probs by a kernel library; nothing happens for "own".

    Raises:
        ConfigError: It is not installed, or the device is no GPU.
    """
    if name == "own":
        return
    if device.type != "cuda":
        allowed, fix = "a trainer on a GPU, or 'own'", "set trainer.head_kernel = 'own'"
        raise ConfigError("trainer.head_kernel = 'liger' needs a GPU", got=f"a trainer on '{device}'", allowed=allowed, fix=fix)
    try:
        from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction  # noqa: F401
    except ImportError as error:
        allowed, fix = "liger-kernel 0.8.3 or newer", "pip install 'oldlogits[liger]'"
        raise ConfigError("trainer.head_kernel needs liger-kernel", got=str(error), allowed=allowed, fix=fix) from error
    model.get_output_embeddings().token_logps = liger_logps


def liger_logps(
    rows: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: Tensor, work: HeadWork
) -> Tensor:
    """Give what `oldlogits.models.head.logps.token_logps` gives, but for the entropy, which is NaN.

    Hidden states are divided by the temperature, and not logits.

    Raises:
        ConfigError: The kernels cannot compute this.
    """
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction

    form = work.form
    if form.factors != form.sums or form.gradients != form.sums:
        raise _refused("fp32 sums of bf16 products", "set trainer.head_compute = 'bf16', or trainer.head_kernel = 'own'")
    if (form.cap or bias is not None) and not bool((temperature == 1).all()):
        got = "logits with a bias or a bound at another temperature than 1"
        raise _refused(got, "set trainer.head_kernel = 'own', or sampling.temperature = 1")
    if work.entropy is not None:
        work.entropy.fill_(math.nan)
    if not len(rows):
        return (rows.sum() * weight.sum()).expand(0)
    factor = form.factor / form.divisor
    scaled = rows.to(form.factors) * (factor / temperature).to(form.factors)[:, None]
    used, used_bias = form.rounded(weight), None if bias is None else form.rounded(bias) * factor
    arguments = (scaled, used, targets, used_bias, None, -100, 0.0, 0.0, "none", form.cap or None, False, torch.float32)
    loss: Tensor = LigerFusedLinearCrossEntropyFunction.apply(*arguments)[0]
    return -loss


def _refused(got: str, fix: str) -> ConfigError:
    return ConfigError(
        "trainer.head_kernel = 'liger' cannot compute this head",
        got=got,
        allowed="products that are rounded to the type of their factors, with neither bias nor bound, or at temperature 1",
        fix=fix,
    )
