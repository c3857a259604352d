"""The plain loop: a PPO step over a transformers model, as a competent person writes it in an afternoon.

Sequences are sorted by length and padded on the right, so many at a time as the logits of all their tokens have room for; the
log-probs of all tokens are taken by ``log_softmax`` and ``gather``, and the loss is masked to the sampled ones. AdamW is fused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.update.batch import Size, Trajectories

LR, EPS_LOW, EPS_HIGH = 1e-6, 0.2, 0.28


def plain_update(folder: Path, size: Size) -> Callable[[], Callable[[], None]]:
    """Make a plain loop; each call of what is returned prepares one update, which is then made."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    trajectories = Trajectories.load(folder / "batch.npz")
    mu = -float(np.log(size.vocabulary))
    num_sampled = int(trajectories.is_sampled.sum())

    def update() -> None:
        optimizer.zero_grad(set_to_none=True)
        for ids, attended, sampled, advantages in micro_batches(trajectories, size.plain_tokens):
            logits = model(input_ids=ids, attention_mask=attended, use_cache=False).logits[:, :-1]
            logps = torch.log_softmax(logits, -1).gather(-1, ids[:, 1:, None]).squeeze(-1)
            ratio = torch.exp(logps - mu)
            clipped = torch.clamp(ratio, 1 - EPS_LOW, 1 + EPS_HIGH)
            values = torch.min(ratio * advantages[:, None], clipped * advantages[:, None])
            loss = -(values * sampled[:, 1:]).sum() / num_sampled
            torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return lambda: update


def micro_batches(trajectories: Trajectories, most: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Yield ids, attention mask, mask of sampled tokens, and advantages, of sequences of like lengths."""
    pieces = trajectories.pieces
    order = sorted(range(len(pieces)), key=lambda i: -len(pieces[i][0]))
    while order:
        width = len(pieces[order[0]][0])
        num = max(1, most // width)
        rows, order = order[:num], order[num:]
        ids, attended = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width, dtype=torch.int64)
        sampled = torch.zeros(len(rows), width)
        for row, i in enumerate(rows):
            length = len(pieces[i][0])
            ids[row, :length], attended[row, :length] = torch.from_numpy(pieces[i][0]), 1
            sampled[row, :length] = torch.from_numpy(pieces[i][1])
        yield ids, attended, sampled, torch.from_numpy(trajectories.advantages[rows])
