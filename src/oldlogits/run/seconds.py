"""How long an update will take, from the recipe's sizes and stated assumptions; the formulas are in docs/cost.md.

trainer   scoring of the proximal policy, switches, gradient, optimizer     one after the other
engines   prefill, decoding                                                 beside the trainer
both      the weight update                                                 an update waits for the slower one, then for this

Environments are not counted: while one engine's sequences wait for tools, others of the same engine are decoded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Gt, Le

from oldlogits.config.schema import RunConfig
from oldlogits.core.policies import OLD
from oldlogits.core.source import SOURCES, provided

if TYPE_CHECKING:
    from oldlogits.run.cost import Cost, ModelShape

_Share = Annotated[float, Gt(0), Le(1)]
_Above = Annotated[float, Gt(0)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumptions:
    """What the seconds of an update are predicted from, beside the recipe; the machine's figures are those of an H100."""

    trainer_gpus: Annotated[int, Ge(0)] = 0
    """GPUs that share the trainer; 0: no seconds are predicted."""
    engine_gpus: Annotated[int, Ge(1)] = 1
    """GPUs that sample, and no others."""
    gpus_per_engine: Annotated[int, Ge(1)] = 1
    """GPUs that share one engine's weights and cache."""
    peak_tflops: _Above = 989.0
    """Dense bf16 TFLOP/s of a GPU."""
    train_share: _Share = 0.40
    """Share of the peak in gradients, recomputed activations not counted as work."""
    score_share: _Share = 0.45
    """Share of the peak in scoring and prefill."""
    memory_gb: _Above = 80.0
    """Memory of a GPU, in GB, of which an engine uses 90%."""
    memory_tb_per_s: _Above = 3.35
    """Bandwidth of a GPU's memory, in TB/s."""
    memory_share: _Share = 0.6
    """Share of that bandwidth in decoding, switches and optimizer."""
    step_overhead_ms: Annotated[float, Ge(0)] = 4.0
    """Milliseconds of a decode step beside what it reads."""
    link_gb_per_s: _Above = 25.0
    """From the host's memory to a GPU, in GB/s: how new weights reach the engines."""
    episode_share: _Share = 0.6
    """Mean length of an episode, as a share of env.max_episode_tokens."""
    sampled_share: _Share = 0.15
    """Share of an episode's tokens that the engine samples; the others are prompt, tools and users."""
    versions_per_episode: Annotated[float, Ge(1)] = 2.0
    """Versions that sample one episode, on average."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """The parts of an update, in seconds.

    Args:
        num_episodes: Episodes that an update trains.
        episode_tokens: Mean tokens of one.
        forwards: Forward passes over an episode that scoring takes, one of them for a reference; 0: nothing is scored.
        sequences: Sequences that one engine decodes at the same time.
        engine_tokens_per_s: Tokens that all engines sample in a second, prefill left out.
    """

    num_episodes: int
    episode_tokens: float
    forwards: float
    score_s: float
    switch_s: float
    train_s: float
    optimizer_s: float
    prefill_s: float
    decode_s: float
    sync_s: float
    sequences: float
    engine_tokens_per_s: float

    @property
    def trainer_s(self) -> float:
        """Of the trainer, without the weight update."""
        return self.score_s + self.switch_s + self.train_s + self.optimizer_s

    @property
    def engines_s(self) -> float:
        """Of the engines, without the weight update."""
        return self.prefill_s + self.decode_s

    @property
    def update_s(self) -> float:
        """Of an update in all."""
        return max(self.trainer_s, self.engines_s) + self.sync_s

    def lines(self, config: RunConfig, a: Assumptions) -> list[str]:
        """One line per part, and the assumptions behind them."""
        sampled, hours = self.num_episodes * self.episode_tokens * a.sampled_share, config.num_updates * self.update_s / 3600
        parts = {
            "an update": f"{self.update_s:,.1f} s, {config.num_updates} updates {hours:,.1f} hours: the slower of trainer and "
            "engines, then the weight update",
            "the trainer": f"{self.trainer_s:,.1f} s: scoring {self.score_s:,.1f} ({self.forwards:g} forwards of a token), "
            f"switches {self.switch_s:,.2f}, gradient {self.train_s:,.1f}, optimizer {self.optimizer_s:,.2f}"
            + ("; at most: what episodes share counts for each" if config.trainer.layout == "shared" else ""),
            "the engines": f"{self.engines_s:,.1f} s: prefill {self.prefill_s:,.1f}, decoding {self.decode_s:,.1f} at "
            f"{self.engine_tokens_per_s:,.0f} tokens/s, {self.sequences:,.0f} sequences an engine",
            "weight update": f"{self.sync_s:,.2f} s",
            "assumed": f"{a.trainer_gpus} GPUs train and {a.engine_gpus} sample ({a.gpus_per_engine} an engine); "
            f"{a.peak_tflops:g} TFLOP/s, {a.train_share:.0%} of it in gradients, {a.score_share:.0%} in scoring and prefill; "
            f"{a.memory_gb:g} GB, {a.memory_tb_per_s:g} TB/s, {a.memory_share:.0%} of it, {a.step_overhead_ms:g} ms a decode "
            f"step; {a.link_gb_per_s:g} GB/s to a GPU; {self.num_episodes} episodes of {self.episode_tokens:,.0f} tokens, "
            f"{a.sampled_share:.0%} of them sampled ({sampled:,.0f}), over {a.versions_per_episode:g} versions; environments "
            "cost nothing. Change them with --assume.NAME",
        }
        return [f"{label:<16} {text}" for label, text in parts.items()]


def predict(config: RunConfig, cost: Cost, a: Assumptions) -> Prediction:
    """Predict an update of a checked recipe on the machine that is assumed."""
    shape, num = cost.shape, config.rollout.prompts_per_update * config.rollout.group_size
    length = a.episode_share * config.env.max_episode_tokens
    source = SOURCES.find(config.proximal.source)
    spans = (a.versions_per_episode + 1) / 2  # each version reads an episode up to the last of its own tokens
    own = (spans if source.provides is OLD else 1.0) if provided(source) else 0.0
    by_trainer_itself, more = 0.0 if source.needs_scorer else own, float(config.objective.has_reference)
    body, head = num * length * _body_flops(shape, length), num * length * a.sampled_share * 2.0 * shape.head_parameters
    rate, bandwidth = a.peak_tflops * 1e12, a.memory_tb_per_s * 1e12 * a.memory_share
    by_trainer, by_engines = a.trainer_gpus * rate, a.engine_gpus * rate * a.score_share
    switches = config.window + 2 if source.stores_versions else 0
    sequences, tokens_per_s = _decoding(config, cost, a, length)
    averaged = 3 * cost.average_bytes  # read twice and written once
    steps = config.trainer.minibatches_per_update
    moved = 2 * cost.optimizer_bytes + 3 * cost.gradient_bytes  # moments and masters are read and written, the gradient is read
    sent = 2 * cost.gradient_bytes if cost.host_bytes else 0  # the gradient to the host's memory, the masters back
    return Prediction(
        num_episodes=num,
        episode_tokens=length,
        forwards=own + more,
        score_s=((by_trainer_itself + more) * body + head * (bool(by_trainer_itself) + more)) / (by_trainer * a.score_share),
        switch_s=(switches * 2 * cost.version_bytes + averaged) / (bandwidth * a.trainer_gpus),
        train_s=3 * (body + head) / (by_trainer * a.train_share),
        optimizer_s=steps * (moved / bandwidth + sent / (a.link_gb_per_s * 1e9)) / a.trainer_gpus,
        prefill_s=spans * body / by_engines,
        decode_s=num * length * a.sampled_share / tokens_per_s,
        sync_s=(cost.sync_bytes + cost.version_bytes) / (a.link_gb_per_s * 1e9),
        sequences=sequences,
        engine_tokens_per_s=tokens_per_s,
    )


def _body_flops(shape: ModelShape, length: float) -> float:
    """Operations of a token's forward pass but the head: two a parameter, four a number of each head for each token seen.

    Of a mixture the experts that serve a token count.
    """
    attention = shape.hidden * shape.head_dim * 2 * (shape.heads + shape.kv_heads)
    layer = 2.0 * (attention + 3 * shape.hidden * shape.mlp) + 4.0 * shape.heads * shape.head_dim * length / 2
    return shape.layers * layer


def _decoding(config: RunConfig, cost: Cost, a: Assumptions, length: float) -> tuple[float, float]:
    """Sequences that one engine decodes at a time, and tokens that all sample in a second.

    A step reads the weights, and keys and values of half an episode for each sequence, in bf16.
    """
    shape, num_engines = cost.shape, max(1, a.engine_gpus // a.gpus_per_engine)
    context = 2 * 2 * shape.layers * shape.kv_heads * shape.head_dim * length / 2
    weights = 2.0 * shape.num_parameters
    free = 0.9 * a.memory_gb * 1e9 * a.gpus_per_engine - weights
    running = config.rollout.prompts_per_update * config.rollout.group_size * (config.max_staleness + 1)
    sequences = max(1.0, min(config.engine.max_num_seqs, running / num_engines, free / context))
    bandwidth = a.memory_tb_per_s * 1e12 * a.memory_share * a.gpus_per_engine
    step_s = a.step_overhead_ms / 1e3 + (weights + sequences * context) / bandwidth
    return sequences, num_engines * sequences / step_s
