"""What a recipe costs in bytes, before it runs; the formulas are in docs/cost.md.

config.json -> the model without storage -> its parameters -> masters, optimizer, store, activations ... -> a rank, a sync
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch
from transformers import PretrainedConfig, PreTrainedModel

from oldlogits.config.schema import RunConfig
from oldlogits.core.engine import ENGINES
from oldlogits.core.environment import MODELS, DescribedModel, is_model_folder
from oldlogits.core.source import SOURCES
from oldlogits.models.head.logps import words_at_once
from oldlogits.models.load import decoder_layers, load_tokenizer, meta_model, read_model_config
from oldlogits.models.lora import check_targets
from oldlogits.models.routing import routers_to_follow
from oldlogits.run.specs import engine_spec, server_options, trainer_spec, view_numerics

RANKS: Final = (1, 2, 4, 8)
"""Numbers of ranks that share a trainer, for which its bytes are said."""

GATHERED_LAYERS: Final = 2
"""Whole layers that a sharded rank holds at a time: the one that computes, and the next."""

PROCESS_BYTES: Final = 460 * 2**20
"""A trainer process without a model: the interpreter, torch and transformers, their mapped files included."""

MOMENT_BYTES: Final[Mapping[str, float]] = {"adamw": 8, "adamw-8bit": 2 + 8 / 256}
"""Bytes of both moments of a parameter, by `trainer.optimizer`: float32, or codes of 8 bits, with a scale for each 256."""

PATCH_SHARES: Final[Mapping[float, float]] = {1e-6: 0.011, 1e-5: 0.065}
"""Of a bf16 copy: the patch of a version in memory, by learning rate, as measured on random models (docs/versions.md)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What bytes depend on: counts of parameters, and widths.

    Args:
        num_parameters: Parameters without adapters, a tied head counted once.
        trained_parameters: Parameters that are trained: those of the adapters, or all.
        head_parameters: Parameters of the head, tied or not.
        is_tied: Whether the head is the embedding.
        layer_parameters: Parameters of the largest layer.
        hidden: Width of the residual stream.
        mlp: Width of what serves a token: of the MLP, or of its experts together.
        norms_heads: Whether query and key heads are normed.
    """

    num_parameters: int
    trained_parameters: int
    head_parameters: int
    is_tied: bool
    layer_parameters: int
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocabulary: int
    norms_heads: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Bytes of the parts of a run, as `lines` names them; the trainer's are those over all of its ranks where it is not said.

    Args:
        version_bytes: A full copy of the forward weights, or of the adapters.
        masters_bytes: The weights in fp32, those of a frozen base included.
        optimizer_bytes: Both moments.
        host_bytes: Moments, masters and gradient in the host's memory, where the optimizer steps there; else 0.
        activation_bytes: A bound of what one micro-batch keeps for its backward pass, on each rank.
        gathered_bytes: Whole layers on each rank of several.
        store_bytes: A bound of what the store holds; 0 where neither the source, the audit nor a reference needs it.
        expected_store_bytes: The same with patches as they were measured.
        reference_bytes: A bound of the patch that leads on from the reference, which both have in them; 0: there is none.
        view_bytes: The trainer's copy of the weights in the engine's numerics, fp32 with a head of its own; none for fp32.
        mixed_bytes: A bound of the keys and values of the mixed-version forward, where OLD is one.
        sync_bytes: A patch as measured, or a full copy.
        snapshot_bytes: The copy in the host's memory that a checkpoint is written from while training goes on.
        checkpoint_bytes: A checkpoint on disk: its folders and its state.
        num_checkpoints: Checkpoints that stay in the run folder, at most.
    """

    shape: ModelShape
    version_bytes: int
    masters_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    host_bytes: int
    activation_bytes: int
    gathered_bytes: int
    store_bytes: int
    expected_store_bytes: int
    reference_bytes: int
    scorer_bytes: int
    average_bytes: int
    view_bytes: int
    engine_bytes: int
    cache_bytes: int
    mixed_bytes: int
    sync_bytes: int
    snapshot_bytes: int
    checkpoint_bytes: int
    num_checkpoints: int

    def rank_bytes(self, num_ranks: int) -> int:
        """What each rank of a trainer holds at most on its device, at the widest moment."""
        weights = self.masters_bytes + self.gradient_bytes + (0 if self.host_bytes else self.optimizer_bytes)
        shared = weights + self.expected_store_bytes + self.average_bytes + self.view_bytes
        gathered = self.gathered_bytes if num_ranks > 1 else 0
        return -(-shared // num_ranks) + self.activation_bytes + self.mixed_bytes + gathered

    @property
    def process_bytes(self) -> int:
        """What the process of a trainer that is alone on the CPU takes at its peak: it trains beside a checkpoint's writing."""
        return PROCESS_BYTES + self.rank_bytes(1) + self.host_bytes + self.snapshot_bytes

    def lines(self, num_ranks: int = 1) -> list[str]:
        """One line per part; of the trainer also for a number of ranks of one's own."""
        ranks = ", ".join(f"{_size(self.rank_bytes(n))} on each of {n}" for n in sorted({*RANKS, num_ranks}) if n > 1)
        parts = {
            "parameters": f"{self.shape.num_parameters:,}",
            "trained": f"{self.shape.trained_parameters:,}",
            "a version": f"{_size(self.version_bytes)}: a full copy of what is trained",
            "masters": _size(self.masters_bytes),
            "gradient": _size(self.gradient_bytes),
            "optimizer": _size(self.optimizer_bytes)
            + (f", in {_size(self.host_bytes)} of host memory with copies of masters and gradient" if self.host_bytes else ""),
            "activations": f"at most {_size(self.activation_bytes)}: of one micro-batch, on each rank",
            "version store": f"{_size(self.expected_store_bytes)}, at most {_size(self.store_bytes)}: one copy, and patches",
            "the reference": f"at most {_size(self.reference_bytes)} of the store; every batch is scored once more"
            if self.reference_bytes
            else "none",
            "dedicated scorer": _size(self.scorer_bytes),
            "weight average": _size(self.average_bytes),
            "engine's view": f"{_size(self.view_bytes)}: the trainer's copy in the engine's numerics",
            "mixed forward": f"at most {_size(self.mixed_bytes)}",
            "a snapshot": f"{_size(self.snapshot_bytes)} of host memory, while a checkpoint is written",
            "trainer in all": f"{_size(self.rank_bytes(1))} on one rank; {ranks}",
            "trainer's peak": f"{_size(self.process_bytes)} on a CPU: all of this, a snapshot and the libraries",
            "engine's weights": f"{_size(self.engine_bytes)} each",
            "engine's cache": _size(self.cache_bytes),
            "weight update": f"{_size(self.sync_bytes)} sent for each version",
            "checkpoints": f"{_size(self.checkpoint_bytes)} each; at most {self.num_checkpoints} stay on disk, "
            f"{_size(self.checkpoint_bytes * (self.num_checkpoints + 1))} with the one being written",
        }
        return [f"{label:<16} {text}" for label, text in parts.items()]


def estimate(config: RunConfig) -> Cost | None:
    """The bytes that a checked recipe will take; None: there is no ``config.json`` in its model folder."""
    model = _model(config)
    if model is None:
        return None
    shape = _shape_of(model, config)
    num, trained = shape.num_parameters, shape.trained_parameters
    masters = 4 * (num + trained if config.model.lora_rank else num)
    version = (2 if config.model.forward_dtype == "bf16" else 4) * trained
    patch = _patch_bytes(config, version)
    own_head = shape.head_parameters if shape.is_tied else 0
    per_token = 2 * 4 * shape.layers * shape.kv_heads * shape.head_dim
    kind, spec = ENGINES.find(config.engine.type)(), engine_spec(config, Path(config.model.path))
    source = SOURCES.find(config.proximal.source)
    stored = config.window + 2 if config.audit.share > 0 else source.most_stored(config.window)  # at a publish
    reference = version if config.objective.has_reference else 0
    stored = stored or (2 if reference else 0)  # where there is a reference alone: the newest two
    average = 4 * trained if source.keeps_average else 0
    moments = math.ceil(MOMENT_BYTES[config.trainer.optimizer] * trained)
    state, is_fp32 = 4 * trained + moments + average, config.model.forward_dtype == "fp32"
    folder = (4 if config.model.lora_rank or is_fp32 else 2) * num
    sends_patches = trainer_spec(config).sends_patches and stored and 2 * patch <= version
    return Cost(
        shape=shape,
        version_bytes=version,
        masters_bytes=masters,
        gradient_bytes=4 * trained,
        optimizer_bytes=moments,
        host_bytes=8 * trained + moments if config.trainer.offload_optimizer else 0,
        activation_bytes=activation_bytes(config, shape),
        gathered_bytes=GATHERED_LAYERS * 4 * max(shape.layer_parameters, shape.head_parameters),
        store_bytes=version * stored + reference,
        expected_store_bytes=version + patch * (stored - 1) + reference if stored else 0,
        reference_bytes=reference,
        scorer_bytes=masters + version + patch * config.proximal.scorer_versions if source.needs_scorer else 0,
        average_bytes=average,
        view_bytes=0 if view_numerics(config) == "fp32" else 4 * (num + own_head),
        engine_bytes=kind.weight_bytes(spec, num_parameters=num, head_parameters=own_head),
        cache_bytes=kind.cache_bytes(spec, token_bytes=per_token),
        mixed_bytes=_most_chains(config) * config.env.max_episode_tokens * per_token,
        sync_bytes=patch if sends_patches else version,
        snapshot_bytes=state + (0 if is_fp32 and not config.model.lora_rank else folder),  # there they are the masters
        checkpoint_bytes=state + folder + (version if config.model.lora_rank else 0),
        num_checkpoints=_num_checkpoints(config),
    )


def _num_checkpoints(config: RunConfig) -> int:
    """A bound of the checkpoints that `loop.checkpoints.kept_versions` lets stay."""
    r = config.record
    made = config.num_updates // r.checkpoint_every + 1 if r.checkpoint_every else 1
    every = config.num_updates // r.keep_every if r.keep_every else 0
    return min(made, r.keep_checkpoints + (r.keep_best and config.eval.every > 0) + every)


def activation_bytes(config: RunConfig, shape: ModelShape) -> int:
    """A bound of what one micro-batch keeps until its backward pass, in the type that is computed in, the parameters left out.

    A layer keeps, of each token: 6 vectors of the hidden width, 2 of queries and of keys (4 where they are normed), 4 of the
    MLP (gate, up, its activation, their product), and 2 numbers of each head and norm. With checkpointing it keeps its input,
    and one layer at a time the rest. The head keeps 3 numbers for each word of one chunk's tokens. With bf16 forward weights
    the rounded weights are kept as well: of all layers, or with checkpointing of one. An adapter keeps its input and output.
    """
    t, s = config.trainer, shape
    tokens = max(t.micro_batch_tokens, config.env.max_episode_tokens)
    heads = (4 if s.norms_heads else 2) * s.head_dim * (s.heads + s.kv_heads)
    layer = 6 * s.hidden + heads + 4 * s.mlp + 2 * s.heads + 2 + config.model.lora_rank * len(config.model.lora_targets)
    kept = s.layers * s.hidden + layer if t.activation_checkpointing else s.layers * layer
    on_gpu = t.device == "cuda" or (t.device == "auto" and torch.cuda.is_available())
    at_once = min(t.head_chunk_tokens, tokens)
    head = 2 * at_once * words_at_once(at_once, s.vocabulary, "cuda" if on_gpu else "cpu")
    rounded = 0
    if config.model.forward_dtype == "bf16":
        rounded = s.layer_parameters if t.activation_checkpointing else s.num_parameters - s.head_parameters
    per_number = 2 if t.compute == "bf16" else 4
    return per_number * (tokens * (kept + 3 * s.hidden + 2 * s.head_dim + 8) + rounded) + 4 * head


def _patch_bytes(config: RunConfig, version_bytes: int) -> int:
    """What a version takes beside the newest: by the learning rate, on a line through the logarithms of what was measured."""
    if config.model.forward_dtype != "bf16":
        return version_bytes  # every fp32 value changes
    (slow, low), (fast, high) = sorted(PATCH_SHARES.items())
    slope = math.log(high / low) / math.log(fast / slow)
    share = low * math.exp(slope * math.log(config.trainer.lr / slow))
    return math.ceil(version_bytes * min(1.0, share))


def _most_chains(config: RunConfig) -> int:
    """A bound of a batch's chains of several versions: each holds an update, and after the first each begins with a turn."""
    if config.engine.kv != "stale" or not config.proximal.accept_mixed_kv:
        return 0
    return config.rollout.prompts_per_update * config.rollout.group_size * min(config.window, config.env.max_turns)


def _model(config: RunConfig) -> PreTrainedModel | None:
    """The recipe's model without storage, if it is one that the recipe can train; None: its config is not known yet.

    Raises:
        ModelFolderError: Its engine or the trainer cannot run the model.
        ConfigError: It has not the layers that get adapters, or the routers that follow the engine's.
    """
    model = _described(config)
    if model is not None and config.model.lora_rank:
        check_targets(model, config.model.lora_targets)
    if model is not None:
        routers_to_follow(model, config.model.routing)
    return model


def _described(config: RunConfig) -> PreTrainedModel | None:
    folder = Path(config.model.path)
    if not is_model_folder(config.model.path):
        starting = MODELS.find(config.model.path)
        return meta_model(starting.architecture(), folder) if isinstance(starting, DescribedModel) else None
    if not (folder / "config.json").is_file():
        return None
    spec = replace(engine_spec(config, folder), max_context=2)  # whether it is long enough is asked when it runs
    model = meta_model(read_model_config(folder), folder)  # before the engine: none samples what the trainer refuses
    ENGINES.find(config.engine.type)().check(spec, server_options(config))
    if (folder / "tokenizer.json").is_file():
        load_tokenizer(folder)
    return model


def _shape_of(model: PreTrainedModel, config: RunConfig) -> ModelShape:
    c = model.config.get_text_config()
    num = sum(p.numel() for p in model.parameters())
    linear = [m for name, m in model.named_modules() if name.rpartition(".")[2] in config.model.lora_targets]
    adapters = config.model.lora_rank * sum(sum(layer.weight.shape) for layer in linear)
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    layers = decoder_layers(model)
    heads = getattr(c, "num_attention_heads", 0)  # Mamba has no attention
    return ModelShape(
        num_parameters=num,
        trained_parameters=adapters or num,
        head_parameters=head.numel(),
        is_tied=head is embedding,
        layer_parameters=max(sum(p.numel() for p in layer.parameters()) for layer in layers),
        layers=len(layers),
        hidden=c.hidden_size,
        heads=heads,
        kv_heads=getattr(c, "num_key_value_heads", None) or heads,  # families without grouped heads
        head_dim=getattr(c, "head_dim", None) or c.hidden_size // max(heads, 1),  # Qwen2 has none
        mlp=_mlp_width(c),
        vocabulary=c.vocab_size,
        norms_heads=any(name.endswith("q_norm") for name, _ in model.named_modules()),
    )


def _mlp_width(config: PretrainedConfig) -> int:
    """The width of what serves a token: of the MLP, or of a mixture's experts together."""
    chosen, expert = getattr(config, "num_experts_per_tok", None), getattr(config, "moe_intermediate_size", None)
    if chosen:
        return int(chosen * (expert or config.intermediate_size))
    return int(getattr(config, "intermediate_size", None) or 4 * config.hidden_size)  # GPT-2's default has none


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.1f} GiB" if num_bytes >= 10 * 2**30 else f"{num_bytes / 2**20:,.1f} MiB"
