"""The trainer: live weights, optimizer, stored versions and average, of one process or sharded over several ranks.

Over several ranks every one makes the same calls, each holds its slices of everything, and all return the same but for weights
and patches.

    put_batch -> scorer.score(tokens, at=version | live) ... -> train -> publish -> (engine reads the weights)
    scorer.score_spans(spans, at=version) at any time: tokens of trajectories that are not, or not yet, in the batch
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from oldlogits.batch.collate import TokenBatch, followed
from oldlogits.core.errors import RunFolderError, writing
from oldlogits.core.loss import LOSSES
from oldlogits.core.scoring import AuditScores, Scored
from oldlogits.core.weights import FullWeights, PolicyVersion
from oldlogits.models.checksums import write_sums
from oldlogits.models.load import load_tokenizer, local, model_of, point_at
from oldlogits.models.lora import write_adapters
from oldlogits.models.ranks import ALONE, Ranks
from oldlogits.models.routing import take_counts
from oldlogits.rpc.client import Dispatcher
from oldlogits.train.audited import Judge
from oldlogits.train.calls import TrainerCalls
from oldlogits.train.checkpoint import (
    STATE,
    OlderVersions,
    Saving,
    Snapshot,
    as_arrays,
    as_lists,
    host_copy,
    of_kind,
    older_files,
    read_older,
    read_state,
    save_tensors,
    sliced,
    unshared,
    write_model,
)
from oldlogits.train.consistency import is_routed
from oldlogits.train.measured_band import MeasuredBand
from oldlogits.train.optimizer import Optimizer
from oldlogits.train.reports import ConsistencyErrors, ProbeNoise, PublishedVersion, TrainerState
from oldlogits.train.scorer import Scorer
from oldlogits.train.spec import TrainerSpec
from oldlogits.train.step import UpdateResult, update
from oldlogits.train.weights.average import Averaging
from oldlogits.train.weights.live import load_live
from oldlogits.train.weights.load import folder_weights
from oldlogits.train.weights.trainer_store import TrainerVersionStore, shards_of

TRAINER_FILE: Final = f"{STATE}/trainer.json"
"""Where version, schedule and the figures of the checks lie in a checkpoint."""


class Trainer:
    """Holds the weights and trains them; its `scorer` scores with them. Together they carry out `TrainerCalls`.

    Each rank that holds the model has such a trainer. The probe, at least two fixed tokens, checks every published version.
    """

    def __init__(self, spec: TrainerSpec, model_folder: Path, probe_ids: Sequence[int], ranks: Ranks = ALONE) -> None:
        loss = LOSSES.find(spec.objective.loss)  # one that is not there is refused here, not at the first step
        self.live = live = load_live(spec, model_folder, ranks)
        self._spec, self._tokenizer = spec, load_tokenizer(model_folder)
        self.store: TrainerVersionStore | None = None
        if spec.stores_versions:
            shards = shards_of(live.model, live.ranks)
            self.store = TrainerVersionStore(spec.versions, live.dtype, shards, live.ranks, sends_patches=spec.sends_patches)
        self._averaging = Averaging(spec.proximal, spec.window, live.weights) if spec.keeps_average else None
        self.scorer = Scorer(
            live,
            self.store,
            self._averaging,
            probe_ids=probe_ids,
            sizes=spec.sizes,
            window=spec.window,
            same_shape=spec.proximal.scoring == "same-shape",
        )
        self.optimizer = Optimizer(live.model, spec)
        self._scored: Scored | None = None
        self._band = MeasuredBand() if spec.measures_band else None
        self._judge = Judge(loss=loss, objective=spec.knobs, max_staleness=spec.max_staleness)
        self._audit: AuditScores | None = None  # of the batch in training
        self._saving: Saving | None = None
        self._older: OlderVersions = {}  # of a checkpoint that was restored, until its version is published
        self.busy_s = 0.0
        """Seconds that calls have taken; counted by what carries them out."""

    @property
    def version(self) -> PolicyVersion:
        """The version of the live weights."""
        return self.live.version

    @property
    def stored_versions(self) -> tuple[PolicyVersion, ...]:
        """The versions that the store holds, ascending; none where nobody asks for stored versions."""
        return self.store.store.versions if self.store is not None else ()

    def publish(self) -> PublishedVersion:
        """Store the live weights as the current version, and note what they give the probe tokens."""
        started = time.perf_counter()
        stored, patches = self.store.publish(self.version, self.live.weights) if self.store is not None else (None, None)
        if self.store is not None:
            self.store.take_over(self._older)
            self._older = {}
        store_s = time.perf_counter() - started
        probe_logps, engine_probe_logps = self.scorer.score_published()
        if self._averaging is not None:
            self._averaging.note_probe(self.version, probe_logps)
        return PublishedVersion(
            version=self.version,
            update=patches or self.full_weights(),
            probe_logps=probe_logps,
            engine_probe_logps=engine_probe_logps,
            is_routed=is_routed(self.live.model),
            probe_noise=self.scorer.probe_noise or ProbeNoise(),
            store_bytes=sum(self.live.ranks.gather(self.store.store.num_bytes)) if self.store is not None else 0,
            store_s=store_s,
            publication=stored,
        )

    def full_weights(self) -> FullWeights:
        """Give the live forward weights, valid until the next step, on the first rank."""
        return self.live.full_weights()

    def put_batch(self, batch: TokenBatch) -> None:
        """Take the batch that the next calls of `Scorer.score` and `train` are about."""
        self._audit = None
        self.scorer.put(followed(batch, self._spec.model.routing))

    def score_reference(self) -> NDArray[np.float32]:
        """Score the loss tokens of the batch at the version that is the reference, and keep the log-probs for `train`.

        Raises:
            VersionEvictedError: The version is not held: the checkpoint was written by another number of ranks.
        """
        batch = self.scorer.current_batch()
        reference = self._spec.objective.reference_at(self.version)
        values = self.scorer.score(np.arange(np.count_nonzero(batch.loss_mask)), reference)
        self.scorer.batch = replace(batch, logp_reference=values)
        return values

    def note_audit(self, scores: AuditScores) -> None:
        """Take exact log-probs of the batch in training, by which the average is formed that takes in the next version."""
        self._audit = scores

    def train(self, scored: Scored | None) -> UpdateResult:
        """Train the batch; the trainer's version rises by one."""
        batch = self.scorer.current_batch()
        self._scored = scored
        live, spec = self.live, self._spec
        if self._band is not None:
            spec = replace(spec, band=self._band.of_batch(batch, self.version, self.scorer.score))
        result = update(
            live.model,
            self.optimizer,
            batch if self._spec.model.routing == "replayed" else replace(batch, chains=None),
            scored,
            version=live.version,
            spec=spec,
            ranks=live.ranks,
            noise=self.scorer.checks.noise,
        )
        metrics = {**result.metrics, **take_counts(live.scoring, live.ranks).metrics("routing/scored")}
        if self._band is not None:
            metrics |= self._band.metrics(spec.band, result.table)
            self._band.note_update(result.table)
        result = replace(result, metrics=metrics)
        self.scorer.checks.note_lag0(result.lag0_max_abs_error, result.rescored_max_abs_error)
        self.scorer.batch = None
        live.version += 1
        if self._averaging is None:
            return result
        started, scores = time.perf_counter(), self._audit
        audit = self._judge.audited(scores, result.table, self._spec.window + 1) if scores is not None else None
        counts = result.staleness_counts
        found, reset = self._averaging.take_in(live.weights, live.version, result.metrics, counts, audit)
        metrics = {**result.metrics, **found, "average/take_in_s": time.perf_counter() - started}
        return replace(result, metrics=metrics, average_reset=reset)

    def retain(self, oldest_needed: PolicyVersion) -> None:
        """Drop stored versions that no token in flight needs."""
        if self.store is not None:
            o = self._spec.objective
            self.store.store.retain(oldest_needed, o.reference_at(self.version) if o.has_reference else None)
        self.scorer.checks.keep({self.version, *self.stored_versions})

    def save_batch(self, folder: Path) -> Path:
        """Write the batch in training, and the proximal policy's log-probs of it, to a folder for a post-mortem."""
        if not self.live.ranks.is_first:
            return folder
        batch = self.scorer.current_batch()
        trajectory_ids = json.dumps(list(batch.trajectory_ids))
        columns = {name: values for name, values in asdict(batch).items() if isinstance(values, np.ndarray)}
        if batch.chains is not None:
            columns |= {f"routing_{name}": values for name, values in asdict(batch.chains).items()}
        if self._scored is not None:
            columns[f"logp_{self._scored.policy}"] = self._scored.values
            if self._scored.left_out is not None:  # NaN there: the training forward was to give them
                columns["left_out"] = self._scored.left_out
        tensors = {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in columns.items()}
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "trajectories.json").write_text(trajectory_ids)
            save_tensors(tensors, folder / "batch.safetensors")
        return folder

    def begin_checkpoint(self, folder: Path, parts: Mapping[str, bytes]) -> None:
        """Copy what a checkpoint holds, and let a thread write it while training goes on; `end_checkpoint` ends it.

        Args:
            folder: An empty folder that is the same on all ranks. ``model/`` becomes a standard one; with adapters it has them
                added, and ``adapter/`` holds them by themselves, as peft reads them.
            parts: The content of other files by their names in the folder.
        """
        m, live, checks = self._spec.model, self.live, self.scorer.checks
        weights = folder_weights(live.model, live.dtype, m.adapter_scale, live.ranks)
        adapters = live.full_weights().tensors if m.lora_rank else {}
        tensors = {"rng": torch.get_rng_state(), **self.optimizer.state(), **sliced("master", live.weights, live.model)}
        if self._averaging is not None:
            tensors |= {f"averaging|{key}": value for key, value in self._averaging.state().items()}
            tensors |= sliced("averaged", self._averaging.average.weights, live.model)
        if self._band is not None:
            tensors |= {f"band|{key}": value for key, value in self._band.state().items()}
        state = host_copy(tensors, live.ranks)
        counters = {"version": live.version, "schedule_steps": self.optimizer.num_steps, "device": live.ranks.device.type}
        counters |= {"probe_logps": as_lists(checks.published), "engine_noise": as_lists(self.scorer.engine_noise)}
        counters |= asdict(checks.errors)
        folders: list[Callable[[], None]] = []
        if live.ranks.is_first:
            at_rest = partial(unshared, live=live.weights, copies=of_kind("master", state))
            model = model_of(live.model.config, live.model.generation_config, at_rest(weights))
            folders += [partial(write_model, folder / "model", model, self._tokenizer)]
            if m.lora_rank:
                write = partial(write_adapters, rank=m.lora_rank, alpha=m.lora_alpha, targets=m.lora_targets, base=m.path)
                folders += [partial(write, folder / "adapter", at_rest(adapters))]
        parts = {**parts, TRAINER_FILE: json.dumps(counters, indent=1).encode()} if live.ranks.is_first else {}
        parts |= older_files(self.store.store.older() if self.store is not None else {}, live.ranks)
        self._saving = Saving(Snapshot(folder=folder, ranks=live.ranks, state=state, parts=parts, folders=folders))

    def end_checkpoint(self, wait: bool) -> bool:
        """Finish the checkpoint that was begun: tell whether it is whole, on the disk and has its checksums.

        All ranks call it. With `wait` it is, when this returns.

        Raises:
            RunWriteError: A rank cannot write it.
        """
        saving, ranks = self._saving, self.live.ranks
        assert saving is not None, "a checkpoint was begun"
        if saving.is_whole:
            return True
        with ranks.agreeing():
            own = saving.outcome(wait=wait)
        found = [sums for sums in ranks.gather(own) if sums is not None]
        if len(found) < ranks.num_ranks:
            return False
        with ranks.agreeing(), writing(saving.folder):
            if ranks.is_first:
                write_sums(saving.folder, {name: value for sums in found for name, value in sums.items()})
        saving.is_whole = True
        return True

    def save(self, folder: Path) -> None:
        """Write a checkpoint to a folder, and wait until it is on the disk."""
        self.begin_checkpoint(folder, {})
        self.end_checkpoint(wait=True)

    def restore(self, folder: Path) -> None:
        """Go on from a checkpoint, written by any number of ranks; the model's weights are loaded too."""
        live, checks, counters_file = self.live, self.scorer.checks, folder / TRAINER_FILE
        with live.ranks.agreeing():
            if not counters_file.is_file():
                raise RunFolderError(
                    f"the checkpoint lacks {counters_file.name}",
                    got=str(folder),
                    allowed="a folder with model/ and state/, which every rank reads",
                    fix="resume from another run folder",
                )
        counters = json.loads(counters_file.read_text())
        with live.ranks.agreeing():
            state, self._older = read_state(folder / STATE, live.model), read_older(folder, live.ranks)
        torch.set_rng_state(state["rng"])
        parameters = dict(live.model.named_parameters())
        for name, master in of_kind("master", state).items():
            parameters[name].data.copy_(master)
        self.optimizer.load(state, counters.pop("schedule_steps"))
        live.version = counters.pop("version")
        same_device = counters.pop("device", live.ranks.device.type) == live.ranks.device.type
        published = as_arrays(counters.pop("probe_logps"))
        self.scorer.engine_noise = as_arrays(counters.pop("engine_noise"))
        exact = same_device and live.arithmetic.compute == torch.float32  # CPUs and GPUs of one kind round bf16 sums otherwise
        checks.restore(published, ConsistencyErrors(**counters), same_arithmetic=exact)
        point_at(live.scoring, live.weights)
        if live.version in published:  # else it was never published
            checks.check(live.scoring, f"the restored version {live.version}", live.version)
        if self._band is not None:
            self._band.load(of_kind("band", state))
        if self._averaging is not None:
            weights = {name: local(weight) for name, weight in of_kind("averaged", state).items()}
            self._averaging.load(of_kind("averaging", state), weights)

    def state(self) -> TrainerState:
        """Tell the version, the largest errors of the consistency checks, and what the trainer has worked."""
        return TrainerState(
            version=self.version,
            consistency=self.scorer.checks.errors,
            num_parameters=self.live.num_parameters,
            num_trained=self.live.num_trained,
            work=self.scorer.work,
            busy_s=self.busy_s,
            oldest_version=_oldest_of(self.stored_versions) if self.stored_versions else self.version,
            padded_because=self.live.padded_because,
        )


class TrainerService(Dispatcher):
    """Carries out `TrainerCalls` by a trainer and its scorer, and counts the seconds by `clock`."""

    def __init__(self, trainer: Trainer, clock: Callable[[], float]) -> None:
        super().__init__(TrainerCalls, trainer, trainer.scorer)
        self._trainer, self._clock = trainer, clock

    def call(self, method: str, arguments: tuple[object, ...]) -> object:
        """Carry out a call."""
        started = self._clock()
        try:
            return super().call(method, arguments)
        finally:
            self._trainer.busy_s += self._clock() - started


def _oldest_of(versions: Sequence[PolicyVersion]) -> PolicyVersion:
    """Give the oldest of the newest versions that follow one another: a reference may stand apart."""
    return next(version for version in reversed(versions) if version - 1 not in versions)
