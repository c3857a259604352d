"""A real model under real steps: SmolLM2-135M-Instruct learns conversations of the order desk.

conversations -> bf16 forward and backward -> fp32 gradients -> AdamW on fp32 masters -> a cast to bf16 is the next version
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import torch
from torch import Tensor
from torch.nn import Parameter
from transformers import PreTrainedTokenizerBase

from oldlogits.bench.synthetic import BETAS
from oldlogits.envs.desk import OrderDesk
from oldlogits.envs.desk_data import WORDS
from oldlogits.envs.shape import tool_names
from oldlogits.policy.chat import ChatFormat
from oldlogits.policy.model import load_model, load_tokenizer, named_weights
from oldlogits.policy.tiny import tiny_tokenizer
from oldlogits.train.warm_start import WarmStartSpec, demonstrations

NUM_SEQUENCES: Final = 2
LENGTH: Final = 128
"""Sequences of a batch, and tokens of each."""


class RealModel:
    """SmolLM2 with fp32 masters under a bf16 forward, trained on next tokens; 2.7 GB for 135 M parameters.

    The moments begin at zero, as in any run: the first steps change more values than later ones.

    Args:
        folder: From `policy.smollm2.fetch`.
        lr: Of AdamW, without weight decay, warm-up or clipping.
    """

    def __init__(self, folder: Path, *, lr: float) -> None:
        model = load_model(folder)
        self._masters = {name: Parameter(weight.clone()) for name, weight in named_weights(model).items()}
        self._model = model.to(torch.bfloat16)
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
    """Endless batches int64 [sequence, token] of one stream of conversations; the same ones every time."""
    words = tiny_tokenizer([*WORDS, *tool_names(OrderDesk)])
    conversations = demonstrations(WarmStartSpec(), ChatFormat(words))
    ids: list[int] = []
    while True:
        while len(ids) < NUM_SEQUENCES * LENGTH:
            ids += tokenizer(words.decode(next(conversations).token_ids) + "\n")["input_ids"]
        batch, ids = ids[: NUM_SEQUENCES * LENGTH], ids[NUM_SEQUENCES * LENGTH :]
        yield torch.tensor(batch).view(NUM_SEQUENCES, LENGTH)
