"""A real model under real steps: SmolLM2-135M-Instruct reads this package.

    text -> bf16 forward and backward -> fp32 gradients -> AdamW on fp32 masters -> a cast to bf16 is the next version

The masters begin at bf16 values, as those of every run on a published bf16 checkpoint do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import torch
from torch import Tensor
from torch.nn import Parameter
from transformers import PreTrainedTokenizerBase

import oldlogits
from oldlogits.bench.synthetic import BETAS
from oldlogits.models.load import load_model, load_tokenizer, named_weights

NUM_SEQUENCES: Final = 2
LENGTH: Final = 128
"""Sequences of a batch, and tokens of each."""


class RealModel:
    """SmolLM2 with fp32 masters under a bf16 forward, trained on next tokens; 2.7 GB for 135 M parameters.

    The moments begin at zero, as in any run.

    Args:
        folder: From `policy.smollm2.fetch`.
        lr: Of AdamW, without weight decay, warm-up or clipping.
    """

    def __init__(self, folder: Path, *, lr: float) -> None:
        self._model = load_model(folder).to(torch.bfloat16)
        self._masters = {name: Parameter(weight.to(torch.float32)) for name, weight in named_weights(self._model).items()}
        self._batches = _batches(load_tokenizer(folder))
        self._optimizer = torch.optim.AdamW(self._masters.values(), lr=lr, betas=BETAS, weight_decay=0.0, fused=True)

    @property
    def masters(self) -> Mapping[str, Tensor]:
        """float32 by Hugging Face name, the tied head once; `step` changes them."""
        return {name: master.data for name, master in self._masters.items()}

    def step(self) -> None:
        """One AdamW step on the next batch."""
        ids = next(self._batches)
        torch.autograd.backward(self._model(input_ids=ids, labels=ids, use_cache=False).loss)
        for name, parameter in self._model.named_parameters():
            assert parameter.grad is not None
            self._masters[name].grad = parameter.grad.to(torch.float32)
            parameter.grad = None
        self._optimizer.step()
        for name, parameter in self._model.named_parameters():
            parameter.data.copy_(self._masters[name].data)


def _batches(tokenizer: PreTrainedTokenizerBase) -> Iterator[Tensor]:
    """Endless batches int64 [sequence, token] from random places of this package's source; the same ones every time."""
    files = sorted(Path(oldlogits.__file__).parent.rglob("*.py"))
    ids = torch.tensor(tokenizer("\n".join(file.read_text(encoding="utf-8") for file in files))["input_ids"])
    generator = torch.Generator().manual_seed(0)
    while True:
        starts = torch.randint(len(ids) - LENGTH, (NUM_SEQUENCES, 1), generator=generator)
        yield ids[starts + torch.arange(LENGTH)]
