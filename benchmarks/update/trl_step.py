"""TRL's GRPO step on the same batch: its trainer's own loss, by `GRPOTrainer.compute_loss`, and one AdamW step.

On a CPU this is its fallback: the fused head, a kernel on GPUs, as torch operations on all tokens behind the prompts,
with entropies for its metrics. Sequences are sorted by length and padded on the right; prompts are as long as each other. This
file imports nothing of the product.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from benchmarks.update.batch import PROMPT, Size, Trajectories
from benchmarks.update.plain import EPS_HIGH, EPS_LOW, LR, micro_batches


def trl_update(folder: Path, size: Size) -> Callable[[], Callable[[], None]]:
    """Make TRL's trainer; each call of what is returned prepares one update, which is then made."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    trajectories, num_prompt = Trajectories.load(folder / "batch.npz"), int(PROMPT * size.shortest)
    config = GRPOConfig(
        output_dir=str(folder / "trl"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        epsilon=EPS_LOW,
        epsilon_high=EPS_HIGH,
        per_device_train_batch_size=size.members,
        num_generations=size.members,
        report_to="none",
        loss_type="grpo",
    )
    trainer = GRPOTrainer(
        model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config,
        train_dataset=Dataset.from_list([{"prompt": "a"}] * size.members),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
    )
    trainer.current_gradient_accumulation_steps = 1
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    mu, num_sequences = -float(np.log(size.vocabulary)), len(trajectories.advantages)
    model.train()

    def update() -> None:
        optimizer.zero_grad(set_to_none=True)
        for ids, attended, sampled, advantages in micro_batches(trajectories, size.plain_tokens):
            loss: Tensor = trainer.compute_loss(
                model,
                {
                    "prompt_ids": ids[:, :num_prompt],
                    "prompt_mask": attended[:, :num_prompt],
                    "completion_ids": ids[:, num_prompt:],
                    "completion_mask": attended[:, num_prompt:],
                    "tool_mask": sampled[:, num_prompt:],
                    "advantages": advantages,
                    "old_per_token_logps": torch.full(ids[:, num_prompt:].shape, mu),
                    "num_items_in_batch": torch.tensor(int(trajectories.is_sampled.sum())),
                },
            )
            torch.autograd.backward(loss * len(ids) / num_sequences)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return lambda: update
