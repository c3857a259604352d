"""The trainer: live weights, optimizer, version store and scoring module, of one process or sharded over several ranks.

    put_batch -> score(tokens, at=version | live) ... -> train -> publish -> (engine reads the weights)
    score_spans(spans, at=version) at any time: tokens of trajectories that are not, or not yet, in the batch

The live weights are never switched: a second module, without gradients, reads the resident copy of the store. Over several
ranks every one makes the same calls, each holds its slices of everything, and all return the same but for weights and patches.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from oldlogits.batch import Sequences, TokenBatch, pack, read_lengths
from oldlogits.config import RunConfig
from oldlogits.core.errors import RunFolderError, VersionEvictedError
from oldlogits.core.scoring import AverageScores, EngineScores, Scored, ScoredSpans, ScoringSpan
from oldlogits.core.source import SOURCES
from oldlogits.core.weights import FullWeights, PolicyVersion
from oldlogits.models.device import find_device
from oldlogits.models.forward import FORWARD_DTYPES, round_at_use
from oldlogits.models.load import load_tokenizer, local, named_weights, point_at, recompute_layers, write_model
from oldlogits.models.lora import write_adapters
from oldlogits.models.mixed_kv import MixedForward
from oldlogits.models.ranks import ALONE, Ranks
from oldlogits.models.scorer import ForwardSizes, score_tokens
from oldlogits.models.sharding import place_model, whole_weights
from oldlogits.train.average import Averaging
from oldlogits.train.checkpoint import of_kind, read_state, sliced, write_state
from oldlogits.train.consistency import (
    CONSISTENCY_TOLERANCE,
    OTHER_DEVICE_TOLERANCE,
    check_consistency,
    is_routed,
    max_error,
    probe_of,
)
from oldlogits.train.engine_view import EngineView
from oldlogits.train.load import folder_weights, load_policy, share_base
from oldlogits.train.optimizer import Optimizer
from oldlogits.train.reports import ConsistencyErrors, PublishedVersion, ScoringWork
from oldlogits.train.step import UpdateResult, update
from oldlogits.train.trainer_store import TrainerVersionStore, shards_of
from oldlogits.train.update_config import UpdateConfig


class Trainer:
    """Holds the weights and trains them.

    Args:
        config: The run.
        model_folder: A Hugging Face folder.
        probe_ids: Fixed tokens, at least two, that witness every published version.
        ranks: That hold the model; each has such a trainer.

    Raises:
        ModelFolderError: The folder cannot be loaded.
    """

    def __init__(self, config: RunConfig, model_folder: Path, probe_ids: Sequence[int], ranks: Ranks = ALONE) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(config.seed)
        self._config = config
        with ranks.agreeing():
            device = find_device(config.trainer_device)
        ranks = ranks.on(device)
        with ranks.agreeing():
            self._model, self._tokenizer = load_policy(config.model, model_folder), load_tokenizer(model_folder)
        self._ranks = ranks
        self._dtype = FORWARD_DTYPES[config.model.forward_dtype]
        self._build_modules()
        source = SOURCES.find(config.proximal.source)
        stores_versions = source.stores_versions or config.audit.share > 0
        sends_patches = config.runtime.type != "lockstep" and config.engine.weight_sync == "auto"
        shards = shards_of(self._model, ranks)
        self._held = (
            TrainerVersionStore(config.versions, self._dtype, shards, ranks, sends_patches=sends_patches)
            if stores_versions
            else None
        )
        self._averaging = Averaging(config, named_weights(self._model)) if source.keeps_average else None
        self._engine_noise: dict[PolicyVersion, NDArray[np.float32]] = {}
        self._probe = probe_of(probe_ids)
        self._probe_logps: dict[PolicyVersion, NDArray[np.float32]] = {}
        self._update_config = UpdateConfig.of(config)
        t = config.trainer
        self._sizes: ForwardSizes = {"micro_batch_tokens": t.micro_batch_tokens, "head_chunk_tokens": t.head_chunk_tokens}
        self._optimizer = Optimizer(self._model, config)
        self._batch: TokenBatch | None = None
        self._scored: Scored | None = None
        self.version: PolicyVersion = 0
        self.consistency = ConsistencyErrors()
        self.work = ScoringWork()

    def _build_modules(self) -> None:
        """From the whole model: one that scores, one that computes as the engine does, and the live one, each in its place."""
        config = self._config
        self._scoring = copy.deepcopy(self._model).requires_grad_(False)
        point_at(self._scoring, {name: weight.to(self._dtype) for name, weight in named_weights(self._model).items()})
        numerics = config.engine.precision
        scale = config.model.adapter_scale
        self._engine_view = None if numerics == "fp32" else EngineView(self._model, numerics, self._dtype, scale, self._ranks)
        if config.trainer.activation_checkpointing:
            recompute_layers(self._model)
        for model in (self._model, self._scoring):
            round_at_use(model, self._dtype)
            place_model(model, self._ranks)
        if self._ranks.mesh is None:
            share_base(self._scoring, self._model)

    @property
    def num_parameters(self) -> int:
        """Parameters of the model, tied ones once."""
        return sum(p.numel() for p in self._model.parameters())

    @property
    def num_trained(self) -> int:
        """Parameters that are trained: all, or those of the adapters."""
        return sum(p.numel() for p in self._model.parameters() if p.requires_grad)

    @property
    def stored_versions(self) -> tuple[PolicyVersion, ...]:
        """The versions that its store holds, ascending; none where the source needs none."""
        return self._held.store.versions if self._held is not None else ()

    def publish(self) -> PublishedVersion:
        """Store the live weights as the current version, and let them witness it."""
        weights = named_weights(self._model)
        started = time.perf_counter()
        publication, patches = self._held.publish(self.version, weights) if self._held is not None else (None, None)
        store_s = time.perf_counter() - started
        update = patches or self.full_weights()
        point_at(self._scoring, weights)
        probe_logps = self._probe_logps[self.version] = self._score_with(self._scoring, *self._probe)
        if self._averaging is not None:
            self._averaging.witness(self.version, probe_logps)
        if self._engine_view is not None:
            self._engine_view.hold(self._model)
        engine_probe_logps = self._score_with(self._engine_model(), *self._probe)
        self._note_noise(engine_probe_logps - probe_logps)
        return PublishedVersion(
            version=self.version,
            update=update,
            probe_logps=probe_logps,
            engine_probe_logps=engine_probe_logps,
            is_routed=is_routed(self._model),
            store_bytes=sum(self._ranks.gather(self._held.store.num_bytes)) if self._held is not None else 0,
            store_s=store_s,
            publication=publication,
        )

    def full_weights(self) -> FullWeights:
        """The live forward weights, for a receiver that cannot take a patch; valid until the next step, on the first rank."""
        return FullWeights(tensors=whole_weights(self._model, self._dtype, self._ranks))

    def put_batch(self, batch: TokenBatch) -> None:
        """Take the batch that the next calls of `score` and `train` are about."""
        self._batch = batch

    def score(self, tokens: NDArray[np.int64], at: PolicyVersion | None) -> NDArray[np.float32]:
        """Log-probs of loss tokens of the batch at a stored version, or with the live weights (None).

        Args:
            tokens: int64, ascending positions among the batch's loss tokens.
            at: The version.

        Raises:
            VersionEvictedError: The version is no longer held.
            ExactnessError: The checkout does not reproduce what the live weights gave at publish.
        """
        batch = self._current_batch()
        flat = np.flatnonzero(batch.loss_mask)[tokens]
        with self._scoring_at(at):
            return self._read(self._scoring, batch, flat)

    def score_mixed(self) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """OLD of all loss tokens of the batch, over keys and values of the versions that computed them in the engine.

        Returns:
            float32 and int64 [loss token]: the values, and the version that scored each.

        Raises:
            VersionEvictedError: A version is no longer held.
            ExactnessError: A checkout does not reproduce what the live weights gave at publish.
            TrajectoryError: The batch does not say which versions computed them.
        """
        batch = self._current_batch()
        forward = MixedForward(self._scoring, batch, **self._sizes, ranks=self._ranks)
        self.work += ScoringWork(read_tokens=forward.num_entries)
        for version in batch.versions:
            with self._scoring_at(version):
                forward.score(version)
        return forward.logps, forward.computed_at

    def score_spans(self, spans: Sequence[ScoringSpan], at: PolicyVersion) -> ScoredSpans:
        """Log-probs of spans of any trajectories at a stored version, or at the live one.

        Raises:
            VersionEvictedError: The version is no longer held.
            ExactnessError: The weights do not reproduce what the live ones gave at publish.
        """
        started, before = time.perf_counter(), self.work
        with self._scoring_at(at):
            values = self._read(self._scoring, *pack(spans))
        work = self.work - before
        return ScoredSpans(
            values=values, seconds_s=time.perf_counter() - started, switch_s=work.switch_s, witness_s=work.witness_s
        )

    def score_average(self, tokens: NDArray[np.int64]) -> AverageScores:
        """Log-probs of loss tokens of the batch under the weights averaged up to the current version.

        Args:
            tokens: int64, ascending positions among the batch's loss tokens.
        """
        assert self._averaging is not None, "a source that averages makes the trainer keep an average"
        started, batch, average = time.perf_counter(), self._current_batch(), self._averaging.average
        point_at(self._scoring, average.weights)
        self.work += ScoringWork(num_checkouts=1, switch_s=time.perf_counter() - started)
        values = self._read(self._scoring, batch, np.flatnonzero(batch.loss_mask)[tokens])
        return AverageScores(values=values, age=average.age)

    def score_engine(self, tokens: NDArray[np.int64]) -> EngineScores:
        """Log-probs of loss tokens of the batch with the live weights in the engine's numerics, as rounded at their publish.

        Args:
            tokens: int64, ascending positions among the batch's loss tokens.
        """
        assert self.version in self._engine_noise, "the live weights are published before they score as the engine"
        batch = self._current_batch()
        flat = np.flatnonzero(batch.loss_mask)[tokens]
        values = self._read(self._engine_model(), batch, flat)
        return EngineScores(logp_mu=batch.logp_mu[flat], values=values, noise=self._engine_noise)

    def train(self, scored: Scored | None) -> UpdateResult:
        """Train the batch; the trainer's version rises by one.

        Raises:
            NonFiniteError: A loss or gradient is not finite.
            ExactnessError: OLD differs from THETA on lag-0 tokens before the first step.
        """
        batch = self._current_batch()
        self._scored = scored
        result = update(
            self._model,
            self._optimizer,
            batch,
            scored,
            version=self.version,
            config=self._update_config,
            ranks=self._ranks,
        )
        self._witness_lag0(result.lag0_max_abs_error)
        self._batch = None
        self.version += 1
        return self._take_in(result) if self._averaging is not None else result

    def _take_in(self, result: UpdateResult) -> UpdateResult:
        """The average takes in the new version."""
        assert self._averaging is not None
        started = time.perf_counter()
        taken = self._averaging.take_in(named_weights(self._model), self.version, result.metrics, result.staleness_counts)
        metrics = {**result.metrics, **taken.metrics, "average/take_in_s": time.perf_counter() - started}
        return replace(result, metrics=metrics, average_reset=taken.reset)

    def retain(self, oldest_needed: PolicyVersion) -> None:
        """Drop stored versions that no token in flight needs."""
        if self._held is not None:
            self._held.store.retain(oldest_needed)
        held = {self.version, *self.stored_versions}
        self._probe_logps = {version: logps for version, logps in self._probe_logps.items() if version in held}

    def save_batch(self, folder: Path) -> Path:
        """Write the batch in training, and the stand-in's log-probs of it, to a folder for a post-mortem."""
        if not self._ranks.is_first:
            return folder
        batch = asdict(self._current_batch())
        folder.mkdir(parents=True, exist_ok=True)
        ids = batch.pop("trajectory_ids")
        if self._scored is not None:
            batch[f"logp_{self._scored.policy}"] = self._scored.values  # one per loss token
        save_file(
            {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in batch.items()},
            folder / "batch.safetensors",
        )
        (folder / "trajectories.json").write_text(json.dumps(list(ids)))
        return folder

    def save(self, folder: Path) -> None:
        """Write a checkpoint: ``model/`` in the standard format, ``state/`` to resume from, under any number of ranks.

        With adapters ``model/`` has them added, and ``adapter/`` holds them by themselves, as peft reads them.

        Args:
            folder: The same on all ranks.
        """
        m = self._config.model
        weights = folder_weights(self._model, self._dtype, m.adapter_scale, self._ranks)
        adapters = self.full_weights().tensors if m.lora_rank else {}
        state = folder / "state"
        if self._ranks.is_first:
            if m.lora_rank:
                write_adapters(
                    folder / "adapter", adapters, rank=m.lora_rank, alpha=m.lora_alpha, targets=m.lora_targets, base=m.path
                )
            write_model(self._model.config, self._model.generation_config, weights, folder / "model")
            self._tokenizer.save_pretrained(folder / "model")
            state.mkdir(parents=True, exist_ok=True)
            logps = self._probe_logps.get(self.version, np.empty(0)).tolist()
            counters = {"version": self.version, "schedule_steps": self._optimizer.num_steps, "probe_logps": logps}
            counters |= asdict(self.consistency) | {"device": self._ranks.device.type}
            (state / "trainer.json").write_text(json.dumps(counters, indent=1))
        self._ranks.gather(None)  # the folder is there
        write_state(state, self._state(), self._ranks)

    def restore(self, folder: Path) -> None:
        """Go on from a checkpoint of `save`, written by any number of ranks; the model's weights are loaded too.

        Raises:
            RunFolderError: The checkpoint is incomplete.
        """
        counters_file = folder / "state" / "trainer.json"
        with self._ranks.agreeing():
            if not counters_file.is_file():
                raise RunFolderError(
                    f"the checkpoint lacks {counters_file.name}",
                    got=str(folder),
                    allowed="a folder with model/ and state/, which every rank reads",
                    fix="resume from another run folder",
                )
        counters = json.loads(counters_file.read_text())
        state = read_state(folder / "state", self._model, self._ranks)
        torch.set_rng_state(state["rng"])
        parameters = dict(self._model.named_parameters())
        for name, master in of_kind("master", state).items():
            parameters[name].data.copy_(master)
        self._optimizer.load(state, counters.pop("schedule_steps"))
        self.version = counters.pop("version")
        same_device = counters.pop("device", self._ranks.device.type) == self._ranks.device.type
        tolerance = CONSISTENCY_TOLERANCE if same_device else OTHER_DEVICE_TOLERANCE
        self._witness_restored(np.array(counters.pop("probe_logps"), np.float32), tolerance)
        self.consistency = ConsistencyErrors(**counters)
        if self._averaging is not None:
            weights = {name: local(weight) for name, weight in of_kind("averaged", state).items()}
            self._averaging.load(of_kind("averaging", state), weights)

    def _state(self) -> dict[str, Tensor]:
        """All that `restore` needs but for counters, by the keys of a state."""
        tensors = {"rng": torch.get_rng_state(), **self._optimizer.state()}
        tensors |= sliced("master", named_weights(self._model), self._model)
        if self._averaging is not None:
            tensors |= {f"averaging|{key}": value for key, value in self._averaging.state().items()}
            tensors |= sliced("averaged", self._averaging.average.weights, self._model)
        return tensors

    def _engine_model(self) -> PreTrainedModel:
        """With the live weights in the engine's numerics; an fp32 engine has the trainer's."""
        if self._engine_view is not None:
            return self._engine_view.model
        point_at(self._scoring, named_weights(self._model))
        return self._scoring

    def _read(self, model: PreTrainedModel, sequences: Sequences, flat: NDArray[np.int64]) -> NDArray[np.float32]:
        """Score what a source asks for, and count it."""
        self.work += ScoringWork(read_tokens=int(read_lengths(sequences, flat).sum()))
        return self._score_with(model, sequences, flat)

    def _score_with(self, model: PreTrainedModel, sequences: Sequences, flat: NDArray[np.int64]) -> NDArray[np.float32]:
        return score_tokens(model, sequences, flat, **self._sizes, ranks=self._ranks)

    def _note_noise(self, noise: NDArray[np.float32]) -> None:
        """Keep what the engine's numerics do to the probe tokens, for the versions within the staleness bound."""
        self._engine_noise[self.version] = noise
        self._engine_noise = {v: kept for v, kept in self._engine_noise.items() if v >= self.version - self._config.window}

    @contextmanager
    def _scoring_at(self, at: PolicyVersion | None) -> Iterator[None]:
        """Point the scoring module at a stored version, or at the live weights: None, or their version if it is not stored."""
        started = time.perf_counter()
        if at is None or (at == self.version and at not in self.stored_versions):
            held: AbstractContextManager[Mapping[str, Tensor]] = nullcontext(named_weights(self._model))
        else:
            held = self._checkout(at)
        with held as weights:
            point_at(self._scoring, weights)
            self.work += ScoringWork(num_checkouts=1, switch_s=time.perf_counter() - started)
            if at is not None:
                self._witness_version(at)
            yield

    def _checkout(self, version: PolicyVersion) -> AbstractContextManager[Mapping[str, Tensor]]:
        if self._held is None:
            raise VersionEvictedError(
                f"version {version} is not in the store",
                got=f"version {version}",
                allowed=f"the live version {self.version}: the source keeps no others",
                fix="use a source that stores versions, such as snapshot",
            )
        return self._held.checkout(version)

    def _current_batch(self) -> TokenBatch:
        assert self._batch is not None, "put_batch comes before score and train"
        return self._batch

    def _witness_version(self, version: PolicyVersion) -> None:
        """Witness (a): the weights about to score reproduce what the live ones gave the probe tokens at publish."""
        started = time.perf_counter()
        error = max_error(self._score_with(self._scoring, *self._probe), self._probe_logps[version])
        self.work += ScoringWork(witness_s=time.perf_counter() - started)
        worst = np.fmax(self.consistency.publish_max_abs_error, error)
        self.consistency = ConsistencyErrors(
            publish_max_abs_error=float(worst), lag0_max_abs_error=self.consistency.lag0_max_abs_error
        )
        check_consistency(error, f"the checkout of version {version}", "the live weights at its publish")

    def _witness_restored(self, published: NDArray[np.float32], tolerance: float) -> None:
        """Witness (c): what was restored gives the probe tokens what the version gave them: the adapters' base is the same."""
        if len(published):
            point_at(self._scoring, named_weights(self._model))
            error = max_error(self._score_with(self._scoring, *self._probe), published)
            check_consistency(error, f"the restored version {self.version}", "the live weights at its publish", tolerance)

    def _witness_lag0(self, error: float) -> None:
        worst = np.fmax(self.consistency.lag0_max_abs_error, error)
        self.consistency = ConsistencyErrors(
            publish_max_abs_error=self.consistency.publish_max_abs_error, lag0_max_abs_error=float(worst)
        )
