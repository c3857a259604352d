"""Trained and scored tokens per second of a random model, as the product's trainer computes them, and the output head."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import torch

from benchmarks.gpu.clock import Budget, seconds_of, timed
from benchmarks.gpu.models import Shape
from benchmarks.gpu.peaks import Peak
from benchmarks.gpu.rows import Row, Rows
from oldlogits.batch.collate import TokenBatch, collate
from oldlogits.batch.pad import MicroBatch
from oldlogits.config.load import config_from_table
from oldlogits.config.schema import RunConfig
from oldlogits.core.policies import OLD
from oldlogits.core.scoring import Scored
from oldlogits.core.trajectory import Context, Sampled, Trajectory, TrajectoryGroup
from oldlogits.models.scorer import head_logps
from oldlogits.run.cost import estimate
from oldlogits.run.specs import trainer_spec
from oldlogits.train.trainer import Trainer

TRAIN_GOAL, SCORE_GOAL, HEAD_GOAL = 0.40, 0.50, 1.2
ROUNDS: Final = 4
"""Updates that are measured at most, after one that warms up."""
USABLE: Final = 0.85
"""Of a device's memory: what a trainer may hold by the estimate; the rest is workspace and fragmentation."""


def recipe_of(
    folder: Path, device: torch.device, *, length: int, sequences: int, compute: str, checkpointing: bool
) -> RunConfig:
    """The recipe of the trainer that is measured: bf16 forward weights, exact old logits."""
    arithmetic = {"compute": compute}
    return config_from_table(
        {
            "model": {"path": str(folder), "forward_dtype": "bf16"},
            "env": {"max_episode_tokens": length},
            "trainer": {
                "lr": 1e-6,
                "warmup_steps": 0,
                "minibatches_per_update": 1,
                "micro_batch_tokens": length * sequences,
                "device": device.type,
                "activation_checkpointing": checkpointing,
                **arithmetic,
            },
        }
    )


def computes_in(config: RunConfig) -> str:
    """The arithmetic of a recipe's trainer."""
    return str(asdict(config.trainer).get("compute", "fp32"))


def memory_of(device: torch.device) -> float:
    """Bytes of a device's memory; infinity on the CPU."""
    return float(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else float("inf")


def fitting_recipe(folder: Path, device: torch.device, *, length: int, sequences: int, compute: str) -> RunConfig | str:
    """The first recipe that fits the device by `oldlogits.run.cost`: whole activations, fewer tokens at once, checkpoints.

    Returns:
        The recipe, or what the smallest of them would take.
    """
    need = 0
    for checkpointing in (False, True):
        for at_once in dict.fromkeys((sequences, max(1, sequences // 2), 1)):
            config = recipe_of(folder, device, length=length, sequences=at_once, compute=compute, checkpointing=checkpointing)
            cost = estimate(config)
            assert cost is not None, "the folder was written"
            need = cost.rank_bytes(1) + cost.version_bytes  # and the second module, which scores
            if need <= USABLE * memory_of(device):
                return config
    return f"needs {need / 2**30:.0f} GiB, of {memory_of(device) / 2**30:.0f}"


def batch_of(config: RunConfig, shape: Shape, version: int, *, sequences: int) -> TokenBatch:
    """Random sequences of the recipe's length, all sampled at a version but the first tokens; half of them succeeded."""
    rng, length, prompt = np.random.default_rng(version), config.env.max_episode_tokens, 16
    made = []
    for i in range(sequences):
        ids = rng.integers(0, min(shape.vocab_size, 50_000), length)
        turn = Sampled(
            token_ids=tuple(map(int, ids[prompt:])),
            logp_mu=(-float(np.log(shape.vocab_size)),) * (length - prompt),
            version=version,
            kv="fresh",
            temperature=1.0,
        )
        segments = (Context(token_ids=tuple(map(int, ids[:prompt]))), turn)
        made.append(Trajectory(id=f"g.{i}", group_id="g", segments=segments, reward=float(i % 2), stop_reason="done"))
    return collate(
        [TrajectoryGroup(id="g", trajectories=tuple(made))], [1.0 - 2.0 * (i % 2) for i in range(sequences)], num_steps=1
    )


def measure_training(
    label: str, folder: Path, shape: Shape, device: torch.device, *, compute: str, peak: Peak, rows: Rows, budget: Budget
) -> Trainer | None:
    """Measure one model; returns its trainer, or None where it does not fit.

    A round publishes a version, scores the batch at the version before, which is checked out, and trains it.
    """
    on_gpu = device.type == "cuda"
    length, sequences = (4096, 4) if on_gpu else (128, 2)
    fitting = fitting_recipe(folder, device, length=length, sequences=sequences, compute=compute)
    if isinstance(fitting, str):
        rows.add(Row(name=f"train {label}", value=None, note=fitting))
        return None
    trainer = Trainer(trainer_spec(fitting), folder, [1, 2, 3, 4, 5])
    trainer.publish()
    scored_s, trained_s, published_s = [], [], []
    for n in range(ROUNDS + 1):
        batch = batch_of(fitting, shape, max(0, n - 1), sequences=2 * sequences)
        trainer.put_batch(batch)
        tokens = np.arange(int(batch.loss_mask.sum()))
        values, took = timed(partial(trainer.scorer.score, tokens, max(0, trainer.version - 1)), device)
        scored_s.append(took)
        scored = Scored(policy=OLD, values=values, computed_at=batch.version[batch.loss_mask], num_switches=1)
        trained_s.append(seconds_of(partial(trainer.train, scored), device))
        published_s.append(seconds_of(trainer.publish, device))
        if n and budget.left_s < 2 * (scored_s[-1] + trained_s[-1] + published_s[-1]):
            break
    measured = len(trained_s) - 1
    read = 2 * sequences * length
    kept = "checkpointed" if fitting.trainer.activation_checkpointing else "kept"
    note = (
        f"{computes_in(fitting)}, {length} tokens a sequence, {fitting.trainer.micro_batch_tokens:,} at once, "
        f"activations {kept}, {measured} rounds{_peak_memory(device)}"
    )
    for name, seconds, is_trained, goal in (
        (f"train {label}", trained_s, True, TRAIN_GOAL),
        (f"score {label}, switch included", scored_s, False, SCORE_GOAL),
    ):
        rate = read / min(seconds[1:])
        share = rate * shape.flops(length, trained=is_trained) / peak.flops
        rows.add(
            Row(
                name=name,
                value=rate,
                unit="tokens/s",
                of_peak=share,
                least=goal if on_gpu else None,
                note=note if is_trained else "",
            )
        )
    rows.add(Row(name=f"publish {label}", value=1000 * min(published_s[1:]), unit="ms", note="store, probe and its check"))
    return trainer


def measure_head(label: str, trainer: Trainer, shape: Shape, device: torch.device, *, peak: Peak, rows: Rows) -> None:
    """Log-probs from hidden states, against the product with the head alone, of the same tokens in the same chunks."""
    model, num = trainer.live.scoring, 16_384 if device.type == "cuda" else 512
    chunk, width = 2048, shape.hidden_size
    dtype = torch.bfloat16 if str(model.get_input_embeddings().weight.dtype) == "torch.bfloat16" else torch.float32
    hidden = torch.randn(1, num, width, device=device)
    column = torch.arange(num)
    micro = MicroBatch(
        input_ids=torch.zeros(1, num, dtype=torch.int64),
        row=torch.zeros(num, dtype=torch.int64),
        column=column,
        targets=torch.randint(shape.vocab_size, (num,)),
        temperature=torch.ones(num),
        flat=column,
    ).to(device)
    head = model.get_output_embeddings().weight.detach().float()

    def product() -> None:
        for start in range(0, num, chunk):
            hidden[0, start : start + chunk] @ head.t()

    def logps() -> None:
        with torch.no_grad():
            head_logps(model, hidden, micro, head_chunk_tokens=chunk)

    seconds, alone = (min(seconds_of(work, device) for _ in range(4)) for work in (logps, product))
    share = 2.0 * num * width * shape.vocab_size / seconds / peak.flops
    rows.add(Row(name=f"head {label}", value=num / seconds, unit="tokens/s", of_peak=share, note=f"weights in {dtype}"))
    rows.add(
        Row(
            name="head / its fp32 product alone",
            value=seconds / alone,
            unit="x",
            most=HEAD_GOAL if device.type == "cuda" else None,
        )
    )


def _peak_memory(device: torch.device) -> str:
    return f", {torch.cuda.max_memory_allocated(device) / 2**30:.0f} GiB at most" if device.type == "cuda" else ""
