"""What is found of a folder, against transformers' own forward pass in float64, one sequence at a time and unpadded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from oldlogits.batch.collate import TokenBatch, collate
from oldlogits.config.load import config_from_table
from oldlogits.config.schema import RunConfig
from oldlogits.core.environment import ChatOptions
from oldlogits.core.errors import ConfigError
from oldlogits.core.policies import OLD
from oldlogits.core.scoring import Scored
from oldlogits.core.trajectory import Context, Sampled, Trajectory, TrajectoryGroup
from oldlogits.models.chat.format import ChatFormat
from oldlogits.models.load import load_tokenizer
from oldlogits.run.specs import trainer_spec
from oldlogits.train.trainer import Trainer

MAX_CONTEXT: Final = 96
"""`env.max_episode_tokens` of the checks: beyond every family's window and original context."""
PROBE: Final = tuple(range(5, 29))
LENGTHS: Final = ((12, 20, 9, 33), (3, 4), (30, 14, 2, 1), (5, 60))
"""Tokens that are read and sampled in turns, by trajectory: from 7 to 74."""
TOOL: Final = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Look a word up.",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]},
    },
}
_PLACES: Final = ("template", "system", "user")

Logps = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """How far log-probs of the same tokens and weights are apart in two packings, in nats."""

    mean: float
    largest: float


def batch_of(vocabulary: int, version: int = 0, seed: int = 0) -> TokenBatch:
    """Make two groups of two trajectories of unequal lengths, sampled at temperatures 1 and 0.7."""
    draw, made = np.random.default_rng(seed), []
    for i, lengths in enumerate(LENGTHS):
        segments: list[Context | Sampled] = []
        for turn, length in enumerate(lengths):
            ids = tuple(draw.integers(0, vocabulary, length).tolist())
            temperature = 0.7 if i % 2 else 1.0
            mu = Sampled(token_ids=ids, logp_mu=(-6.0,) * length, version=version, temperature=temperature)
            segments.append(mu if turn % 2 else Context(token_ids=ids))
        one = Trajectory(
            id=f"g{i // 2}.{i % 2}", group_id=f"g{i // 2}", segments=tuple(segments), reward=i % 2, stop_reason="done"
        )
        made.append(one)
    groups = [TrajectoryGroup(id=f"g{i // 2}", trajectories=tuple(made[i : i + 2])) for i in (0, 2)]
    return collate(groups, [-1.0, 1.0, -1.0, 1.0], num_steps=1)


def plain_logps(folder: Path, batch: TokenBatch, *, forward_dtype: str = "fp32") -> Logps:
    """Score the loss tokens of a batch as transformers does: one sequence a forward, no padding, no mask, in float64.

    Where rotary frequencies depend on the length, each sequence is read with others behind it, up to `MAX_CONTEXT` tokens.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager").eval()
    if forward_dtype == "bf16":
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.bfloat16().double())
    longrope = "longrope" in json.dumps(model.config.to_dict().get("rope_parameters"))
    found = []
    for start, end in zip(batch.starts[:-1], batch.starts[1:], strict=True):
        ids, temperature = torch.from_numpy(batch.token_ids[start:end]), torch.from_numpy(batch.temperature[start + 1 : end])
        read = torch.cat([ids, ids.new_zeros(MAX_CONTEXT - len(ids))]) if longrope else ids
        with torch.no_grad():
            logits = model(read[None], use_cache=False).logits[0, : len(ids) - 1].double() / temperature[:, None]
        chosen = torch.log_softmax(logits, -1).gather(1, ids[1:, None])[:, 0]
        found.append(chosen[torch.from_numpy(batch.loss_mask[start + 1 : end])])
    return torch.cat(found).numpy()


def recipe_of(folder: Path, **sections: Mapping[str, object]) -> RunConfig:
    """Make the recipe of a trainer over the folder; its engine is vLLM, which refuses no family."""
    table: dict[str, object] = {
        "max_staleness": 1,
        "model": {"path": str(folder)},
        "env": {"max_episode_tokens": MAX_CONTEXT},
        "engine": {"type": "vllm"},
        "runtime": {"type": "local"},
        "trainer": {"lr": 1e-2, "warmup_steps": 0, "minibatches_per_update": 1, "head_chunk_tokens": 7},
    }
    for name, section in sections.items():
        table[name] = {**dict(table.get(name, {})), **section}  # type: ignore[call-overload]
    return config_from_table(table)


class Checked:
    """A trainer over a folder, and what is found of it.

    Args:
        folder: The model folder.
        forward_dtype: `model.forward_dtype`.
    """

    def __init__(self, folder: Path, forward_dtype: str = "fp32") -> None:
        self.folder, self._dtype = folder, forward_dtype
        self.trainer = self._open(folder, micro_batch_tokens=4 * MAX_CONTEXT)
        self.trainer.publish()
        self.batch = batch_of(self.trainer.live.model.config.get_text_config().vocab_size)
        self._all = np.arange(int(self.batch.loss_mask.sum()))

    def _open(self, folder: Path, *, micro_batch_tokens: int) -> Trainer:
        trainer, model = {"micro_batch_tokens": micro_batch_tokens}, {"forward_dtype": self._dtype}
        return Trainer(trainer_spec(recipe_of(folder, trainer=trainer, model=model)), folder, PROBE)

    def scored(self, tokens: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        """Score loss tokens with the live weights, all sequences in one padded micro-batch where they fit."""
        self.trainer.put_batch(self.batch)
        return self.trainer.scorer.score(self._all if tokens is None else tokens, None)

    def alone(self) -> NDArray[np.float32]:
        """Score all loss tokens with one sequence a forward pass."""
        trainer = self._open(self.folder, micro_batch_tokens=1)
        trainer.publish()
        trainer.put_batch(self.batch)
        return trainer.scorer.score(self._all, None)

    def cut(self) -> NDArray[np.float32]:
        """Score the loss tokens of the first sampled turn of each trajectory: what comes later is not read."""
        return self.scored(self.early)

    @property
    def early(self) -> NDArray[np.int64]:
        """The loss tokens of the first sampled turns, by position."""
        flat = np.flatnonzero(self.batch.loss_mask)
        ends = self.batch.starts[:-1] + [sum(lengths[:2]) for lengths in LENGTHS]
        return np.flatnonzero(flat < ends[self.batch.sequence[flat]])

    def noise(self) -> Noise:
        """Compare three packings: all sequences side by side, each alone, and each only up to its first sampled turn."""
        whole = self.scored()
        apart = np.abs(np.concatenate([self.alone() - whole, self.cut() - whole[self.early]]))
        return Noise(mean=float(apart.mean()), largest=float(apart.max()))

    def update(self) -> tuple[NDArray[np.float32], float]:
        """Train the batch; return THETA before the step, in the order of the loss tokens, and the lag-0 error."""
        old = Scored(policy=OLD, values=self.scored(), computed_at=np.zeros(len(self._all), np.int64), num_switches=1)
        result = self.trainer.train(old)
        return np.asarray(result.table["logp_theta"], np.float32), result.lag0_max_abs_error

    def reloaded(self, to: Path) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Write a checkpoint; return what trainers give that resume from it, and that start from its model folder."""
        self.trainer.save(to)
        resumed, started = (self._open(to / "model", micro_batch_tokens=4 * MAX_CONTEXT) for _ in range(2))
        resumed.restore(to)
        found = []
        for trainer in (resumed, started):
            trainer.put_batch(self.batch)
            found.append(trainer.scorer.score(self._all, None))
        return found[0], found[1]


def chat_of(folder: Path, tools_in: str, kwargs: str, tools: Sequence[object] = (TOOL,)) -> ChatFormat:
    """Open the chat format of a folder with a tool and a system prompt."""
    options = ChatOptions(tools_in=tools_in, template_kwargs=json.loads(kwargs))  # type: ignore[arg-type]
    return ChatFormat(load_tokenizer(folder), tools, "be kind", options)  # type: ignore[arg-type]


def tools_in(folder: Path, kwargs: str) -> tuple[str, str]:
    """Tell the first place of tools that the folder's template can be used with, empty for none, and why not the others."""
    why = ""
    for place in _PLACES:
        try:
            chat_of(folder, place, kwargs)
        except ConfigError as error:
            why = str(error).partition(";")[0]
        else:
            return place, why
    return "", why
