"""The recipe: every key, its unit and its default. One field, one meaning."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveConfig:
    """The masked importance-sampling objective."""

    eps_low: float = 0.2
    """Clip of r_s from below, for negative advantages: 1 - eps_low."""
    eps_high: float = 0.28
    """Clip of r_s from above, for positive advantages: 1 + eps_high."""
    dual_clip: float = 3.0
    """Upper bound of r_s for negative advantages, > 1; inf switches it off."""
    clip: Literal["ppo", "truncated"] = "ppo"
    """ppo: a token beyond eps_low, eps_high or dual_clip is masked. truncated: none is; the weight r_s of a token's gradient
    is capped at objective.is_cap (truncated importance sampling, with variant = "ppo_clip_train_infer")."""
    is_cap: float = 2.0
    """clip = "truncated" only: the largest weight r_s, > 1; inf: no bound."""
    mismatch_correction: Literal["weight_and_mask", "mask"] = "weight_and_mask"
    """What r_d does: weights and masks, or masks only."""
    interpolation_mu: float = 0.5
    """The weight on MU of a linear or log-linear interpolation, in [0, 1]."""
    interpolation_schedule: Literal["fixed", "a3po"] = "fixed"
    """fixed: interpolation_mu for every token. a3po: 1 / s at staleness s (1 at staleness 0), whatever interpolation_mu is."""
    loss_aggregation: Literal["token-mean", "token-mean-kept", "sequence-mean", "constant"] = "token-mean"
    """What the loss is divided by; peers differ by N / N_kept on the same data."""
    loss_aggregation_tokens: float = 1.0
    """The divisor of loss_aggregation = "constant", in tokens per optimizer step."""
    advantage: Literal["group-normalised", "mean-only", "leave-one-out"] = "group-normalised"
    """How rewards of a group become advantages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProximalConfig:
    """The source of the proximal policy's log-probs: of OLD, or of the policy that the variant uses in its place."""

    source: str = "snapshot"
    """snapshot | dedicated | interruption | eager | arrival | ewma | aged | rescore | none."""
    accept_mixed_kv: bool = False
    """engine.kv = "stale" only: accept that OLD of tokens that were sampled over keys and values of older versions is that
    of their own version over keys and values of those versions; they are labelled mixed_kv. Source snapshot."""
    scorer_versions: int = 2
    """dedicated only: the newest versions that the scorer holds; tokens of older ones are scored from the trainer's store."""
    decay: Literal["fixed", "max-lag", "mean-lag", "auto"] = "max-lag"
    """ewma and aged: how beta is chosen. fixed: proximal.beta. max-lag: W / (W + 2), W the largest lag. mean-lag:
    m / (1 + m), m the measured token-weighted mean lag. auto: the smallest expected error over the measured lags
    (docs/ewma.md)."""
    beta: float = 0.0
    """decay = "fixed" only: the decay of the average from one version to the next, in (0, 1)."""
    reset: Literal["none", "paper", "guarded"] = "none"
    """ewma and aged: when the average is reset to the live weights. paper: rho < proximal.reset_below. guarded: and the
    band would keep more tokens with the live weights, and none of the last W versions was a reset."""
    reset_below: float = 0.9
    """The rho below which proximal.reset asks for a reset, in (0, 1]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditConfig:
    """Exact log-probs beside those of the route in use: how often does the stand-in decide otherwise than OLD?"""

    share: float = 0.0
    """Share of the batches that are refereed, evenly spaced, in [0, 1]; training itself does not change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The trainer's model."""

    path: str = "tiny"
    """A Hugging Face folder of the Llama/Qwen family, or an embedded model after its warm start: "tiny" or, a mixture of
    experts, "tiny-moe"."""
    seed: int = -1
    """Seed of the tiny model and of the warm start; -1 takes the run's seed."""
    warm_start_steps: int = -1
    """Supervised steps on demonstrations of the order desk before the run, which are cached; -1 takes the built-in number for
    an embedded model, and none for a folder."""
    forward_dtype: Literal["fp32", "bf16"] = "fp32"
    """Of the forward weights, whose bits are a version. bf16: they are rounded from fp32 masters, which the optimizer steps and
    nothing scores; patches of versions are small. The arithmetic is that of fp32 (docs/sharding.md)."""

    lora_rank: int = 0
    """Rank of LoRA adapters, which are trained instead of the weights and are all that a version consists of; 0: none."""
    lora_alpha: float = 32.0
    """With model.lora_rank: the adapters' product is scaled by lora_alpha / lora_rank."""
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """With model.lora_rank: the linear layers that get an adapter, by the last part of their name."""

    @property
    def is_tiny(self) -> bool:
        """Whether the model is an embedded one."""
        return self.path in ("tiny", "tiny-moe")

    @property
    def adapter_scale(self) -> float:
        """Of the adapters' product; 0: there are none."""
        return self.lora_alpha / self.lora_rank if self.lora_rank else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvConfig:
    """The environment and the turns with it."""

    target: str = "desk"
    """desk, desk_long, desk_slow, or package.module:Class."""
    train_data: str = ""
    """A JSONL file of tasks for training, one `reset(**row)` a line; empty: the class makes its own rows."""
    eval_data: str = ""
    """A JSONL file of tasks for evaluation."""
    parser: str = "plain"
    """How tool calls are written: plain | hermes."""
    max_turns: int = 16
    """Assistant turns per episode."""
    max_tokens_per_turn: int = 32
    """Sampled tokens per assistant turn."""
    max_episode_tokens: int = 256
    """Tokens per episode, context included."""
    timeout_s: float = 20.0
    """Seconds that one tool call, reply, reset or reward may take."""
    latency_s: float = 0.0
    """Mean seconds of a simulated, exponentially distributed tool latency (runtime local); 0: none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingConfig:
    """The distribution that training rollouts are sampled from. Reshaping it is refused."""

    temperature: float = 1.0
    """Logits are divided by it, > 0."""
    top_p: float = 1.0
    """Must be 1 in training: below, mu has another support than the trained policy."""
    top_k: int = 0
    """Must be 0 in training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """The engine that samples."""

    type: Literal["embedded", "vllm"] = "embedded"
    """embedded: a process of the run. vllm: servers that speak vLLM's HTTP routes, of the run's own or running already."""
    precision: Literal["fp32", "bf16", "fp8", "int8", "int4", "fp8_dynamic"] = "fp32"
    """The engine's numerics; all but fp32 are emulated and give a real discrepancy."""
    max_num_seqs: int = 128
    """Sequences decoded at the same time."""
    kv: Literal["recompute", "stale"] = "recompute"
    """What happens to keys and values of running sequences when the weights change."""
    weight_sync: Literal["auto", "full"] = "auto"
    """What the engine is given. auto: a patch where the source keeps versions and it is below half a copy. full: all."""
    probe_tolerance: float = -1.0
    """Largest mean |log-prob difference| of the probe in nats; -1 takes the known value of the numerics."""
    urls: tuple[str, ...] = ()
    """vllm only: running servers of this machine, such as "http://127.0.0.1:8000"; empty: the run starts its own."""
    token_env: str = ""
    """engine.urls only: the environment variable that holds their bearer token; empty: they want none."""
    server: Literal["vllm", "embedded"] = "vllm"
    """vllm without urls: what is started: vLLM, or the embedded engine behind the same routes (`oldlogits serve`)."""
    num_servers: int = 1
    """vllm without urls: how many are started."""
    flags: tuple[str, ...] = ()
    """vllm without urls: further flags of the server's command line."""
    python: str = ""
    """vllm without urls: the Python interpreter that has the server installed; empty: this one."""
    recover_s: float = 300.0
    """vllm only: seconds without any server that answers, after which the run ends."""
    request_timeout_s: float = 600.0
    """vllm only: seconds that a request may run; then it is sent again with what it has. A server that answers none of its
    requests for so long counts as hung."""
    control_timeout_s: float = 60.0
    """vllm only: seconds that pause, weight update, resume and abort may take."""
    start_timeout_s: float = 300.0
    """vllm without urls: seconds that a server may take until it answers."""
    max_restarts: int = 5
    """vllm without urls: how often servers that ended are started again, in all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutConfig:
    """Groups of episodes."""

    group_size: int = 8
    """Episodes of one task, compared with each other."""
    prompts_per_update: int = 16
    """Groups that one version of the trainer consumes."""
    max_running_groups: int = 0
    """Groups sampled at the same time; 0: as many as the staleness bound admits."""
    filter_uniform: bool = False
    """Leave out groups whose rewards are all equal (no advantage); they are counted as filtered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerConfig:
    """Optimizer steps."""

    lr: float = 5e-4
    """Learning rate of AdamW after the warm-up."""
    warmup_steps: int = 4
    """Optimizer steps over which the learning rate rises linearly."""
    min_lr_ratio: float = 1.0
    """Learning rate at the last update as a share of `lr`; it falls linearly from update 0 on; 1: constant."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    beta1: float = 0.9
    """AdamW's first-moment decay."""
    beta2: float = 0.99
    """AdamW's second-moment decay."""
    max_grad_norm: float = 1.0
    """Largest norm of the gradient."""
    minibatches_per_update: int = 2
    """Optimizer steps between two published versions; the groups of a version are dealt out among them."""
    micro_batch_tokens: int = 8192
    """Largest padded size of one forward, in tokens."""
    head_chunk_tokens: int = 2048
    """Tokens that go through the output head at once."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the trainer and the dedicated scorer keep their models. auto: on a GPU if torch finds one and nobody else has it:
    not in lockstep, which repeats bit for bit, on Ray only with ray.trainer_gpus, and not beside a vLLM that the run starts.
    The embedded engine always computes on the CPU."""
    activation_checkpointing: bool = False
    """Keep the activations between layers only, and compute those inside of a layer again in the backward pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionsConfig:
    """How exact versions are kept, where a source needs them, and how they reach the engine."""

    uncompressed: int = 4
    """Newest patches that stay as they are; older ones are compressed."""
    budget_bytes: int = 0
    """Memory for all patches beside the resident copy; over it they are compressed, then left on disk. 0: no bound."""
    folder: str = ""
    """Where versions are written if there is a budget; empty: versions/ of the run folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeConfig:
    """Who runs where."""

    type: Literal["lockstep", "local", "ray"] = "local"
    """lockstep: one process, virtual time, bit for bit repeatable. local: engine and trainer in processes of their own on
    this machine. ray: actors of a Ray cluster, one or several nodes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LockstepConfig:
    """Read by runtime.type = "lockstep" only: how stale every token is."""

    lag: Literal["fresh_first", "even", "skewed", "random"] = "even"
    """How the lags of a trajectory's tokens are spread over 0 .. max_lag."""
    max_lag: int = 4
    """The largest lag, in versions; at most max_staleness."""
    tokens_per_version: int = 12
    """Mean number of tokens that a trajectory samples with one version before it switches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RayConfig:
    """runtime.type = "ray" only: who runs on which part of the cluster."""

    address: str = ""
    """Of a running cluster, "auto" for the one of this machine; empty: the run starts one here that has what it needs."""
    num_workers: int = 2
    """Rollout workers: each an engine and a share of the environments. `oldlogits workers` changes it while a run runs."""
    worker_cpus: float = 1.0
    """CPUs that a worker reserves."""
    worker_gpus: float = 0.0
    """GPUs that a worker reserves for its engine."""
    trainer_cpus: float = 1.0
    """CPUs that the trainer reserves, and likewise the dedicated scorer."""
    trainer_gpus: float = 0.0
    """GPUs that the trainer reserves, and likewise the dedicated scorer."""
    placement: Literal["PACK", "SPREAD", "STRICT_SPREAD"] = "SPREAD"
    """Of the first workers on the nodes. PACK: few nodes. SPREAD: many. STRICT_SPREAD: each worker on a node of its own."""
    start_timeout_s: float = 300.0
    """Seconds until the cluster must have given every actor its place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig:
    """Held-out evaluation: sampled (T = 1) and greedy, before and after, and points in between; and the calibration."""

    num_episodes: int = 1024
    """Episodes before and after training, each sampled and greedy; 0: no evaluation."""
    every: int = 0
    """Updates between evaluation points during training; 0: none. The last update is one if num_episodes = 0."""
    num_episodes_during: int = 128
    """Sampled episodes of each such point."""
    num_calibration: int = 32
    """Trajectories of the first batch on which the engine's own noise is measured, before the first step; 0: none."""
    max_concurrent: int = 256
    """Episodes evaluated at the same time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordConfig:
    """What is written into the run folder besides events."""

    tokens_every: int = 1
    """Updates between per-token tables; 0: none."""
    transcripts_every: int = 5
    """Updates between full transcripts (one group) in episodes.jsonl; 0: none."""
    checkpoint_every: int = 20
    """Updates between checkpoints; 0: only at the end."""
    trackers: tuple[str, ...] = ()
    """Tracking tools that follow the run: wandb | trackio | tensorboard | mlflow, or "package.module:Name"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """A run: everything that `oldlogits train` needs to know."""

    variant: str = "decoupled_exact"
    """A row of the paper's table: `oldlogits show variants` lists them."""
    band: float = 1.5
    """The discrepancy band [1/band, band] on r_d, > 1; inf: no band."""
    seed: int = 0
    """Seed of everything that is drawn."""
    num_updates: int = 60
    """Versions to publish."""
    max_staleness: int = 4
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
        """The seed of the tiny model and its warm start."""
        return self.seed if self.model.seed < 0 else self.model.seed

    @property
    def trainer_device(self) -> Literal["auto", "cpu", "cuda"]:
        """`trainer.device`, where "auto" is decided by the recipe alone."""
        starts_vllm = self.engine.type == "vllm" and not self.engine.urls and self.engine.server == "vllm"
        has_no_gpu = {"lockstep": True, "ray": not self.ray.trainer_gpus, "local": starts_vllm}[self.runtime.type]
        return "cpu" if self.trainer.device == "auto" and has_no_gpu else self.trainer.device

    @property
    def window(self) -> int:
        """The largest lag that this runtime can produce, in versions."""
        return self.lockstep.max_lag if self.runtime.type == "lockstep" else self.max_staleness
