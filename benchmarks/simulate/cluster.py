"""Step times of a model on many GPUs, by arithmetic: what a scenario of a cluster starts from, with named presets.

    forward of t tokens        2 P t / (peak FLOP/s * utilisation), P the parameters that are active for a token
    gradients of t tokens      8 P t: forward, backward, and the forward again (activation checkpointing)
    decode step                weights and the keys and values in use are read once / memory bandwidth
    weights to the engines     bytes on the wire / bandwidth of a node, patches applied, every GPU loads its part
    another version to score   patches applied, every GPU of the trainer loads its part
    publish                    every GPU of the trainer gives its part to its host, the patch is encoded

Every key can be set in a TOML file; the defaults are those of the preset "4b".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Final, Literal

from benchmarks.simulate.scenario import DrawnWorkload, EngineTimes, Scenario, ScorerTimes, TrainerTimes
from oldlogits.config.reader import Table, build
from oldlogits.core.errors import ConfigError
from oldlogits.core.source import SOURCES

ENCODE_COPIES: Final = 2.4
"""Seconds of encoding a patch, in those of a memcpy of all weights: docs/versions.md, at a learning rate of 1e-6."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """The model."""

    parameters: float = 4.02e9
    """Of all its weights."""
    active_parameters: float = 4.02e9
    """Of those that one token uses."""
    layers: int = 36
    """Layers that keep keys and values."""
    kv_heads: int = 8
    """Heads of keys and values."""
    head_dim: int = 128
    """Of a head."""

    @property
    def weights_bytes(self) -> float:
        """A bf16 copy."""
        return 2 * self.parameters

    @property
    def token_bytes(self) -> float:
        """Keys and values of a token in bf16."""
        return 2.0 * 2 * self.layers * self.kv_heads * self.head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """The machines."""

    gpus_per_node: int = 8
    """GPUs that share a host and its network."""
    peak_flops: float = 989e12
    """Dense bf16 FLOP/s of a GPU."""
    memory_bytes: float = 80e9
    """Of a GPU."""
    memory_bytes_per_s: float = 3.35e12
    """Bandwidth of a GPU's memory."""
    host_bytes_per_s: float = 25e9
    """From host memory to one GPU, all GPUs of a node at the same time."""
    apply_bytes_per_s: float = 80e9
    """Weights of a copy in host memory that patches are applied to, in a second: about a memcpy by eight threads, 10 GB/s
    each; a patch's blocks are independent."""
    node_bytes_per_s: float = 50e9
    """Network of a node, each way."""
    train_utilisation: float = 0.4
    """Share of the peak in gradients."""
    forward_utilisation: float = 0.45
    """Share of the peak in prefill and scoring."""
    decode_utilisation: float = 0.6
    """Share of the memory bandwidth in decoding."""
    step_overhead_s: float = 0.004
    """Of a decode step, beside what it reads: scheduling, sampling, launches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Which GPUs do what."""

    num_gpus: int = 64
    """All."""
    engine_share: float = 0.75
    """Of them, engines."""
    scorer_share: float = 0.2
    """Of the others, the second model of the route "dedicated"; the trainer has the rest."""
    engine_gpus: int = 1
    """GPUs of one engine."""
    max_num_seqs: int = 96
    """Sequences that an engine decodes at the same time, if its memory holds them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterRollout:
    """Groups, as in a recipe."""

    group_size: int = 8
    """Episodes per group."""
    groups_per_gpu: float = 0.5
    """Groups that one version consumes, for every GPU of the cluster."""
    max_staleness: int = 4
    """The bound, in versions."""
    kv: Literal["recompute", "stale"] = "recompute"
    """What an update does with keys and values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sync:
    """How a version travels to the engines."""

    weights: Literal["full", "patch"] = "patch"
    """full: a copy to every node. patch: what changed, applied to a copy that every node has in host memory."""
    patch_share: float = 0.01
    """Bytes of a patch, as a share of a copy: about 0.01 at a learning rate of 1e-6, 0.06 at 1e-5."""
    pause_s: float = 0.05
    """Until the engines rest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """A model on a cluster."""

    name: str = "4b"
    """Shown."""
    num_updates: int = 12
    """That the figures are of."""
    rest_s: float = 0.5
    """An update's own seconds beside scores, gradients and publish: building and recording the batch."""
    seed: int = 0
    """Of what is drawn."""
    model: ModelSize = field(default_factory=ModelSize)
    hardware: Hardware = field(default_factory=Hardware)
    layout: Layout = field(default_factory=Layout)
    rollout: ClusterRollout = field(default_factory=ClusterRollout)
    sync: Sync = field(default_factory=Sync)
    workload: DrawnWorkload = field(default_factory=DrawnWorkload)

    @property
    def num_engines(self) -> int:
        """Engines."""
        return max(1, round(self.layout.num_gpus * self.layout.engine_share / self.layout.engine_gpus))

    @property
    def max_num_seqs(self) -> int:
        """Sequences of an engine: as asked for, and as many as fit beside the weights."""
        free = 0.9 * self.hardware.memory_bytes * self.layout.engine_gpus - self.model.weights_bytes
        return min(self.layout.max_num_seqs, int(free / (self.workload.mean_context * self.model.token_bytes)))

    def num_learning_gpus(self, route: str) -> tuple[int, int]:
        """GPUs of the trainer, and of the dedicated scorer."""
        rest = self.layout.num_gpus - self.num_engines * self.layout.engine_gpus
        scorer = max(1, round(rest * self.layout.scorer_share)) if route == "dedicated" else 0
        return rest - scorer, scorer

    @property
    def skip(self) -> int:
        """First updates that the figures leave out: two times what is outstanding at most, of which the first is a stock."""
        return 2 * (self.rollout.max_staleness + 1)

    @property
    def sync_bytes(self) -> float:
        """That reach every node with a version."""
        return self.model.weights_bytes * (self.sync.patch_share if self.sync.weights == "patch" else 1.0)

    @property
    def load_s(self) -> float:
        """Seconds from the first byte on the wire until every engine holds the version."""
        h = self.hardware
        load_s = self.model.weights_bytes / self.layout.engine_gpus / h.host_bytes_per_s
        return self.sync_bytes / h.node_bytes_per_s + self._copy_s(1) + load_s

    @property
    def num_versions(self) -> int:
        """In the store at a publish: that of the oldest token in flight, the new one, and those between."""
        return self.rollout.max_staleness + 2

    @property
    def store_bytes(self) -> float:
        """Of the store, over all hosts of the trainer: the newest version as a copy, the others as patches or as copies."""
        return self.model.weights_bytes + (self.num_versions - 1) * self.sync_bytes

    def scenario(self, route: str) -> Scenario:
        """What to simulate.

        Raises:
            ConfigError: The route is unknown, the engines leave no GPU to learn, or a sequence does not fit.
        """
        if route not in SOURCES.names:
            raise ConfigError("unknown route", got=route, allowed=", ".join(SOURCES.names), fix="choose some of these")
        trainer_gpus, scorer_gpus = self.num_learning_gpus(route)
        if trainer_gpus < 1 or self.max_num_seqs < 1:
            raise ConfigError(
                "the cluster is too small",
                got=f"{self.layout.num_gpus} GPUs, {self.num_engines} engines of {self.layout.engine_gpus}, "
                f"{trainer_gpus} to train, {self.max_num_seqs} sequences to an engine",
                allowed="at least one of each",
                fix="raise layout.num_gpus or layout.engine_gpus, or lower layout.engine_share",
            )
        return Scenario(
            name=self.name,
            route=route,
            workload=self.workload,
            engine=self._engine_times(),
            trainer=self._trainer_times(trainer_gpus),
            scorer=self._scorer_times(scorer_gpus) if scorer_gpus else None,
            num_engines=self.num_engines,
            max_num_seqs=self.max_num_seqs,
            pause_s=self.sync.pause_s,
            load_s=self.load_s,
            group_size=self.rollout.group_size,
            prompts_per_update=max(1, round(self.rollout.groups_per_gpu * self.layout.num_gpus)),
            max_staleness=self.rollout.max_staleness,
            num_updates=self.skip + self.num_updates,
            skip=self.skip,
            recompute=self.rollout.kv == "recompute",
            seed=self.seed,
        )

    def _forward_s(self, num_gpus: int) -> float:
        """A token of a forward pass."""
        return 2 * self.model.active_parameters / (self.hardware.peak_flops * self.hardware.forward_utilisation * num_gpus)

    def _copy_s(self, num_hosts: int) -> float:
        """Going over a copy on so many hosts, where versions are patches: a memcpy."""
        return self.model.weights_bytes / (num_hosts * self.hardware.apply_bytes_per_s) * (self.sync.weights == "patch")

    def _switch_s(self, num_gpus: int, copies: float) -> float:
        """From host memory to the GPUs or back, and so many times over the hosts' copy."""
        num_hosts = math.ceil(num_gpus / self.hardware.gpus_per_node)
        return self.model.weights_bytes / (num_gpus * self.hardware.host_bytes_per_s) + copies * self._copy_s(num_hosts)

    def _engine_times(self) -> EngineTimes:
        h, m, num_gpus = self.hardware, self.model, self.layout.engine_gpus
        bandwidth = h.memory_bytes_per_s * h.decode_utilisation * num_gpus
        return EngineTimes(
            step_s=h.step_overhead_s + m.weights_bytes / bandwidth,
            sequence_s=self._forward_s(num_gpus),
            context_s=m.token_bytes / bandwidth,
            prefill_s=self._forward_s(num_gpus),
        )

    def _trainer_times(self, num_gpus: int) -> TrainerTimes:
        h = self.hardware
        return TrainerTimes(
            read_s=self._forward_s(num_gpus),
            checkout_s=self._switch_s(num_gpus, 1),
            token_s=8 * self.model.active_parameters / (h.peak_flops * h.train_utilisation * num_gpus),
            rest_s=self.rest_s,
            publish_s=self._switch_s(num_gpus, ENCODE_COPIES),
        )

    def _scorer_times(self, num_gpus: int) -> ScorerTimes:
        switch_s = self._switch_s(num_gpus, 1)
        arrives_s = self.sync_bytes / self.hardware.node_bytes_per_s
        return ScorerTimes(read_s=self._forward_s(num_gpus), checkout_s=switch_s, publish_s=arrives_s + switch_s)


PRESETS: Final[Mapping[str, Cluster]] = MappingProxyType(
    {
        "4b": Cluster(),
        "30b-a3b": Cluster(
            name="30b-a3b",
            model=ModelSize(parameters=30.5e9, active_parameters=3.3e9, layers=48, kv_heads=4, head_dim=128),
            hardware=Hardware(train_utilisation=0.2, forward_utilisation=0.25),
            layout=Layout(engine_gpus=2),
        ),
    }
)
"""Qwen3-4B and Qwen3-30B-A3B on nodes of eight 80 GB GPUs. Experts are harder to keep busy: half the utilisation."""


def load_cluster(name: str, table: Table | None = None) -> Cluster:
    """A preset, or the keys of a TOML file over the defaults.

    Raises:
        ConfigError: There is no such preset, or a key is unknown or of another type.
    """
    if table is not None:
        return build(Cluster, table)
    if name not in PRESETS:
        raise ConfigError(
            "no run folder, scenario or preset of that name",
            got=name,
            allowed=f"a run folder, a TOML file, or {', '.join(PRESETS)}",
            fix=f"python -m benchmarks.simulate {next(iter(PRESETS))}",
        )
    return PRESETS[name]


def with_gpus(cluster: Cluster, num_gpus: int) -> Cluster:
    """The same on another number of GPUs."""
    return replace(cluster, layout=replace(cluster.layout, num_gpus=num_gpus))
