"""The recipe: every key, its range, its unit and its default. One field, one meaning.

A range stands in the annotation of its field; the string below a field is what `oldlogits show recipe` prints.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from oldlogits.config.episodes import EnvConfig, EvalConfig, RolloutConfig, SamplingConfig
from oldlogits.config.ranges import (
    AboveOne,
    AboveZero,
    Auto,
    Count,
    Decay,
    Few,
    NotNegative,
    Positive,
    Seed,
    Share,
    Tokens,
    Versions,
)
from oldlogits.config.systems import EngineConfig, LockstepConfig, RayConfig, RuntimeConfig, VersionsConfig
from oldlogits.core.backend import BACKENDS
from oldlogits.core.engine import ENGINES
from oldlogits.core.loss import LOSSES
from oldlogits.core.policies import EXPERIMENTAL_VARIANTS, OLD, VARIANTS, find_variant
from oldlogits.core.scoring import Layout
from oldlogits.core.server import SERVER_PROTOCOLS
from oldlogits.core.source import SOURCES
from oldlogits.core.tracker import TRACKERS
from oldlogits.core.trajectory import RoutingMode


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveConfig:
    """The loss, its bounds, and what it is divided by."""

    loss: Annotated[str, LOSSES] = "masked_is"
    """What is made of the log-probs of a micro-batch (docs/variants.md)."""
    eps_low: Annotated[float, Gt(0), Lt(1)] = 0.2
    """Negative advantages: r_s is clipped below 1 - eps_low."""
    eps_high: AboveZero = 0.28
    """Positive advantages: r_s is clipped above 1 + eps_high."""
    dual_clip: AboveOne = 3.0
    """Negative advantages: r_s is clipped above dual_clip; inf switches it off."""
    clip_by_lag: Literal["none", "inverse", "inverse-sqrt"] = "none"
    """A narrower clip for older tokens: eps_low and eps_high over 1 + s, or over its root, at staleness s. For losses that
    clip token by token."""
    clip: Literal["ppo", "truncated"] = "ppo"
    """ppo: a token beyond eps_low, eps_high or dual_clip is masked. truncated: none is; the weight r_s of a token's gradient
    is capped at objective.is_cap (truncated importance sampling, with variant = "ppo_clip_train_infer")."""
    is_cap: AboveOne = 2.0
    """clip = "truncated" only: the largest weight r_s; inf: no bound."""
    mismatch_correction: Literal["weight_and_mask", "mask"] = "weight_and_mask"
    """What r_d does to a token: it weights and masks it, or only masks it."""
    interpolation_mu: Share = 0.5
    """The weight on MU of a linear or log-linear interpolation."""
    interpolation_schedule: Literal["fixed", "a3po"] = "fixed"
    """fixed: interpolation_mu for every token. a3po: 1 / s at staleness s (1 at staleness 0), whatever interpolation_mu is."""
    loss_aggregation: Literal["token-mean", "token-mean-kept", "sequence-mean", "constant"] = "token-mean"
    """What the loss is divided by; other trainers differ by N / N_kept on the same data."""
    loss_aggregation_tokens: AboveZero = 1.0
    """The divisor of loss_aggregation = "constant", in tokens per optimizer step."""
    advantage: Literal[
        "group-normalised", "mean-only", "leave-one-out", "batch-normalised", "token-normalised", "batch-baseline", "turn-to-go"
    ] = "group-normalised"
    """How rewards become advantages. group-normalised: GRPO. mean-only: Dr. GRPO. leave-one-out: RLOO. batch-normalised: less
    the group's mean, over the standard deviation of the batch. token-normalised: the same with mean and deviation over its
    tokens. batch-baseline: mean and deviation of the batch, which a rollout.group_size of 1 needs. turn-to-go: of each
    turn by itself, what the episode was given from it on, less the group's mean (docs/regularisers.md)."""
    branch_weight: Literal["each", "shared"] = "each"
    """What each branch of an agent program's episode (a conversation of its own, such as a sub-agent's, or the one after a
    compaction) gets of the episode's advantage. each: all of it. shared: an equal part of it."""
    kl_coefficient: NotNegative = 0.0
    """Weight of the divergence from a reference, an earlier version of this run (docs/regularisers.md); 0: there is none."""
    kl_in: Literal["loss", "reward"] = "loss"
    """With objective.kl_coefficient: where the divergence counts. loss: each token's estimate is added to its loss. reward: the
    sum over an episode's tokens of log mu - log reference is taken off its reward, before rewards become advantages."""
    kl_estimator: Literal["auto", "k1", "k2", "k3"] = "auto"
    """With objective.kl_coefficient: the estimate from a token's log-ratio. auto: k3 in the loss, k1 in the reward. k2: in the
    loss its gradient is that of KL(theta || reference)."""
    kl_reference_every: Count = 0
    """With objective.kl_coefficient: updates after which the reference moves on to the version of that moment; 0: it stays at
    version 0, with which the run begins."""
    entropy_bonus: NotNegative = 0.0
    """Weight of the entropy of THETA's distribution at each loss token, which is added to the token's surrogate; 0: none."""

    @property
    def has_reference(self) -> bool:
        """Whether there is a reference, whose version is kept and scores every batch."""
        return self.kl_coefficient > 0

    @property
    def kl_estimate(self) -> Literal["k1", "k2", "k3"]:
        """`kl_estimator`, where "auto" is decided."""
        if self.kl_estimator != "auto":
            return self.kl_estimator
        return "k3" if self.kl_in == "loss" else "k1"

    def reference_at(self, version: int) -> int:
        """Give the version that is the reference of a batch that enters training at `version`."""
        return version // self.kl_reference_every * self.kl_reference_every if self.kl_reference_every else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ProximalConfig:
    """The proximal policy, which r_s is taken over: OLD, or what the variant uses in its place."""

    source: Auto | Annotated[str, SOURCES] = "auto"
    """What computes the proximal policy's log-probs. auto: the first source that provides what the variant needs: snapshot for
    OLD, arrival for ASYNC, ewma for EWMA, aged, rescore, or none where none is needed."""
    current_version: Literal["training-forward", "scored"] = "training-forward"
    """OLD of tokens of the version that enters training, in its first optimizer step. training-forward: what the forward pass
    of that step gives them, which is OLD by definition; it saves a forward pass, and one in 16 of their trajectories is scored
    all the same, as a check. scored: as all other tokens; loss_aggregation = "token-mean-kept" needs that in any case."""
    scoring: Literal["prefix", "same-shape"] = "prefix"
    """How a batch's tokens of older versions are scored. prefix: each trajectory up to its last token of the version.
    same-shape: in the very micro-batches that train them, which leaves no packing noise in bf16 and reads more tokens
    (docs/exactness.md)."""
    accept_mixed_kv: bool = False
    """engine.kv = "stale" with source snapshot only: tokens that were sampled over keys and values of older versions are scored
    at their own version over keys and values of those versions, and are labelled mixed_kv."""
    scorer_versions: Annotated[int, Ge(1), Le(10_000)] = 2
    """dedicated only: the newest versions that the scorer holds; tokens of older ones are scored from the trainer's store."""
    decay: Literal["fixed", "max-lag", "mean-lag", "auto"] = "max-lag"
    """ewma and aged: how beta is chosen. fixed: proximal.beta. max-lag: W / (W + 2), W the largest lag. mean-lag:
    m / (1 + m), m the measured token-weighted mean lag. auto: the smallest expected error over the measured lags
    (docs/ewma.md)."""
    beta: Decay = 0.0
    """decay = "fixed" only, and then above 0: the decay of the average from one version to the next."""
    reset: Literal["none", "paper", "guarded"] = "none"
    """ewma and aged: when the average is reset to the live weights. paper: rho < proximal.reset_below. guarded: and the
    band would keep more tokens with the live weights, and none of the last W versions was a reset."""
    reset_below: Annotated[float, Gt(0), Le(1)] = 0.9
    """The rho, the share of tokens that stay active, below which proximal.reset asks for a reset."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditConfig:
    """Exact log-probs beside those of the source: how often does the proximal policy decide otherwise than OLD?"""

    share: Share = 0.0
    """The share of batches that are audited, evenly spaced; training itself does not change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The trainer's model."""

    path: str = "tiny"
    """A Hugging Face folder, or a starting model that makes one: tiny, tiny-moe, smollm2, or "package.module:function"."""
    seed: Seed | Auto = "auto"
    """Seed of a starting model and of the warm start; auto: the run's seed."""
    warm_start_steps: Count | Auto = "auto"
    """Supervised steps on demonstrations of the environment before the run, whose result is cached; auto: the starting
    model's own number, and none for a folder."""
    chat_tools: Literal["template", "system", "user"] = "template"
    """Where the model reads of its tools. template: the chat template writes them, and one that leaves out names, descriptions
    or parameters is refused. system, user: in the system message, or at the beginning of the first user message together with
    the system prompt; results of tools are then user messages."""
    chat_template_kwargs: str = ""
    """Further variables of the chat template as JSON, such as '{"enable_thinking": false}'; every rendering gets them."""
    forward_dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """The type of the forward weights, whose bits are a version. bf16: they are rounded from fp32 masters, which the optimizer
    steps and nothing scores; patches of versions are small. auto: that of trainer.compute (docs/exactness.md)."""
    routing: RoutingMode = "off"
    """Mixtures of experts: what is made of the experts that the engine chose for each token. recorded: they are kept with the
    token and compared with the trainer's choice. replayed: the trainer chooses the same (docs/experts.md)."""
    lora_rank: Annotated[int, Ge(0), Le(65_536)] = 0
    """Rank of LoRA adapters, which are trained instead of the weights and are all that a version consists of; 0: none."""
    lora_alpha: AboveZero = 32.0
    """With model.lora_rank: the adapters' product is scaled by lora_alpha / lora_rank."""
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """With model.lora_rank: the linear layers that get an adapter, by the last part of their name."""

    @property
    def adapter_scale(self) -> float:
        """The factor of the adapters' product; 0: there are no adapters."""
        return self.lora_alpha / self.lora_rank if self.lora_rank else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerConfig:
    """Optimizer steps."""

    lr: Annotated[float, Ge(1e-12), Le(1)] = 5e-4
    """Learning rate of AdamW after the warm-up."""
    warmup_steps: Count = 4
    """Optimizer steps over which the learning rate rises linearly."""
    min_lr_ratio: Share = 1.0
    """Learning rate at the last update as a share of `lr`; it falls linearly from update 0 on; 1: constant."""
    weight_decay: Annotated[float, Ge(0), Le(10)] = 0.0
    """AdamW's weight decay."""
    beta1: Decay = 0.9
    """AdamW's first-moment decay."""
    beta2: Decay = 0.99
    """AdamW's second-moment decay."""
    max_grad_norm: Annotated[float, Ge(1e-9)] = 1.0
    """Largest norm of the gradient."""
    optimizer: Literal["adamw", "adamw-8bit"] = "adamw"
    """adamw: AdamW with both moments in float32. adamw-8bit: with moments in codes of 8 bits, a quarter of the bytes, by
    bitsandbytes; for a trainer of one rank."""
    offload_optimizer: bool = False
    """Keep the moments in the host's memory and step there, on a copy of the masters: 8 bytes a parameter less on a GPU, with
    gradients and masters copied over at every step."""
    lr_by_staleness: Literal["none", "inverse"] = "none"
    """inverse: the learning rate of an optimizer step is divided by the mean staleness of its tokens, where that is above 1."""
    minibatches_per_update: Positive = 2
    """Optimizer steps between two published versions: the groups of a batch are shared out among them."""
    compute: Literal["fp32", "bf16"] = "fp32"
    """The arithmetic of forward and backward; norms, softmax, log-probs, masters and optimizer are fp32 in any case. bf16 needs
    forward weights in bf16; log-probs then depend on how a batch is packed, which every run measures (docs/exactness.md)."""
    head_compute: Literal["fp32", "bf16"] = "fp32"
    """compute = "bf16" only: the logits. fp32: products of bf16 numbers are summed in fp32. bf16: and then rounded to bf16, as
    an engine that computes its head in bf16 does."""
    layout: Layout = "shared"
    """How sequences are laid out in a forward. shared: side by side without padding, and what they begin with alike, such as
    the prompt of a group, is read once. packed: each reads its own. padded: all are as long as the longest. Models with
    recurrent layers, soft-capped attention or attention sinks are padded in any case (docs/models.md)."""
    micro_batch_tokens: Tokens = 8192
    """Largest size of one forward, in tokens, padding included."""
    head_chunk_tokens: Tokens = 1024
    """Tokens that go through the output head at once. Their logits are formed for a few words at a time, so that memory does
    not grow with the vocabulary."""
    head_kernel: Literal["own", "liger"] = "own"
    """What computes log-probs from hidden states. own: torch operations, on all devices. liger: liger-kernel, on GPUs, where it
    takes fewer passes over memory; it gives no entropy, and with compute = "bf16" it needs head_compute = "bf16"."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the trainer and the dedicated scorer keep their models. auto: on a GPU if torch finds one and nobody else has it:
    not in lockstep, which repeats bit for bit, on Ray only with ray.trainer_gpus, and not beside a vLLM that the run starts.
    The embedded engine has engine.device."""
    num_threads: Few = 1
    """Threads of one operation on the CPU, in the process of the trainer and in that of the dedicated scorer. Sums depend on
    it: a run with another number gives other numbers."""
    activation_checkpointing: bool = False
    """Keep the activations between layers only, and compute those inside of a layer again in the backward pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordConfig:
    """What is written into the run folder besides events."""

    tokens_every: Count = 1
    """Updates between per-token tables; 0: none."""
    transcripts_every: Count = 5
    """Updates between full transcripts (one group) in episodes.jsonl; 0: none."""
    checkpoint_every: Count = 20
    """Updates between checkpoints, the first of which is written at the start; 0: only at the end."""
    keep_checkpoints: Positive = 2
    """The newest checkpoints that stay in the run folder; older ones are removed when the next is whole."""
    keep_best: bool = True
    """Keep the checkpoint with the best held-out success, too, among those whose version was evaluated (eval.every)."""
    keep_every: Count = 0
    """Keep the checkpoints whose version is a multiple of this, too; 0: none."""
    trackers: tuple[Annotated[str, TRACKERS], ...] = ()
    """Tracking tools that follow the run; each is an optional extra."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """A run: everything that `oldlogits train` needs to know."""

    variant: Annotated[str, (*VARIANTS, *EXPERIMENTAL_VARIANTS)] = "decoupled_exact"
    """A row of the paper's table, which says what r_d and r_s are: `oldlogits show variants`."""
    band: AboveOne = 1.5
    """Tokens whose mismatch ratio r_d is outside of [1/band, band] are masked; inf: none is."""
    seed: Seed = 0
    """The seed of everything that is drawn."""
    num_updates: Positive = 60
    """Updates of the policy: batches to train on, after each of which a new version is published."""
    max_staleness: Versions = 4
    """No token is trained when the trainer is more than this many versions ahead of it."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    proximal: ProximalConfig = field(default_factory=ProximalConfig)
    audit: AuditConfig = field(default_factory=AuditConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    env: EnvConfig = field(default_factory=EnvConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    versions: VersionsConfig = field(default_factory=VersionsConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    lockstep: LockstepConfig = field(default_factory=LockstepConfig)
    ray: RayConfig = field(default_factory=RayConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    record: RecordConfig = field(default_factory=RecordConfig)

    @property
    def model_seed(self) -> int:
        """The seed of a starting model and of the warm start."""
        return self.seed if self.model.seed == "auto" else self.model.seed

    @property
    def takes_training_forward(self) -> bool:
        """Whether the training forward gives OLD of the tokens of its own version."""
        wanted = self.proximal.current_version == "training-forward" and self.objective.loss_aggregation != "token-mean-kept"
        return wanted and find_variant(self.variant).proximal is OLD

    @property
    def trainer_device(self) -> Literal["auto", "cpu", "cuda"]:
        """`trainer.device`, where "auto" is decided by the recipe alone."""
        runtime, engine = BACKENDS.find(self.runtime.type), self.engine
        if runtime.on_cluster:
            has_no_gpu = not self.ray.trainer_gpus
        else:
            starts_servers = ENGINES.find(engine.type)().has_servers and not engine.urls
            has_no_gpu = runtime.steps_engine or (starts_servers and SERVER_PROTOCOLS.find(engine.server).uses_gpu)
        return "cpu" if self.trainer.device == "auto" and has_no_gpu else self.trainer.device

    @property
    def engine_device(self) -> Literal["auto", "cpu", "cuda"]:
        """`engine.device`, where "auto" is decided by the recipe alone."""
        runtime = BACKENDS.find(self.runtime.type)
        has_no_gpu = not self.ray.worker_gpus if runtime.on_cluster else runtime.steps_engine
        return "cpu" if self.engine.device == "auto" and has_no_gpu else self.engine.device

    @property
    def window(self) -> int:
        """The largest lag that this runtime can produce, in versions."""
        return self.lockstep.max_lag if BACKENDS.find(self.runtime.type).controls_lag else self.max_staleness
