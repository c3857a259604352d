"""TRL: exact old logits for `AsyncGRPOTrainer`; `trl_sync.py` is for `GRPOTrainer`.

    child process   VersionedRolloutLoop: the version of every turn ------------------- samples --> rollout_buffer
    trainer         transfer.send_weights --tee--> PatchStore (or adapters on disk) --> OLD --> old_log_probs, completion_mask

TRL's asynchronous loss divides by `old_log_probs`. There it finds OLD instead of what the engine returned, so that its clip
acts on ``r_s = theta / old``; tokens whose ``r_d = old / mu`` is outside of the band leave `completion_mask`. This is the
variant `decoupled_exact` with the discrepancy as a mask. For TRL 1.16, whose asynchronous trainer is experimental.
"""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel
from trl.experimental.async_grpo.async_grpo_trainer import AsyncGRPOTrainer, RolloutWorkerProtocol, WeightTransferProtocol
from trl.experimental.async_grpo.async_rollout_worker import RolloutGroup, RolloutSample, _AsyncRolloutLoop

from oldlogits.core.errors import ConfigError, ExactnessError, MissingLogprobError
from oldlogits.core.weights import PolicyVersion
from oldlogits.objective import band_mask
from oldlogits.sources.tagged import HeldVersions, StoredModel, TaggedTokens, lengths_differ, tee
from oldlogits.sources.weight_folders import AdapterFolders, StepFolders
from oldlogits.versions import PatchStore

_PINNED: ContextVar[PolicyVersion | None] = ContextVar("version of the running turn", default=None)
_AT_ONCE = 64
"""The most samples that are scored together."""


class SampledLogprob(float):
    """A log-prob that an engine returned, and the version that sampled its token; -1 where the weights changed meanwhile."""

    __slots__ = ("version",)
    version: PolicyVersion

    def __new__(cls, value: float, version: PolicyVersion) -> Self:
        """Make one of what an engine returned."""
        one = super().__new__(cls, value)
        one.version = version
        return one


@dataclass(slots=True)
class VersionedSample(RolloutSample):  # type: ignore[misc]
    """TRL's sample with a version for each token: int64 [token], -1 on context; `logp_mu` is kept where OLD takes its place."""

    versions: NDArray[np.int64] = field(kw_only=True)
    logp_mu: NDArray[np.float32] | None = field(kw_only=True, default=None)


class VersionedRolloutLoop(_AsyncRolloutLoop):  # type: ignore[misc]
    """TRL's rollout loop, which notes the version of every turn.

    With adapters a turn names its version in the request, and has that one to its end. Else it is the version before and after
    the request; where an update of the weights came between, nobody knows which tokens are older, and the turn is not trained.
    """

    @property
    def model_version(self) -> PolicyVersion:
        """The version that a turn names in its request; outside of one, the newest."""
        pinned = _PINNED.get()
        return int(super().model_version) if pinned is None else pinned

    async def _generate_one_turn(self, prompt_ids: list[int]) -> tuple[list[int], list[float]]:
        version = self.model_version
        reset = _PINNED.set(version)
        try:
            ids, logps = await super()._generate_one_turn(prompt_ids)
        finally:
            _PINNED.reset(reset)
        if len(ids) != len(logps) or None in logps:
            raise lengths_differ("an engine's tokens and log-probs", f"{len(ids)} and {sum(lp is not None for lp in logps)}")
        is_one = self.lora_name is not None or self.model_version == version
        return ids, [SampledLogprob(logp, version if is_one else -1) for logp in logps]

    async def _score_group(self, group: RolloutGroup) -> list[RolloutSample]:
        samples = await super()._score_group(group)
        rows = [row for rows in group.completions_sequences for row in rows]
        versioned, num_crossed = [], 0
        for sample, row in zip(samples, rows, strict=True):
            tags = [logp.version if isinstance(logp, SampledLogprob) else -1 for logp in row.old_log_probs]
            versions = np.where(sample.completion_mask.astype(bool), tags, -1).astype(np.int64)
            mask = np.where(versions >= 0, sample.completion_mask, 0)
            num_crossed += int(sample.completion_mask.sum() - mask.sum())
            known = {f.name: getattr(sample, f.name) for f in fields(sample)} | {"completion_mask": mask}
            versioned.append(VersionedSample(**known, versions=versions))
        self._push_metrics({"exact/crossed_update_tokens_total": float(num_crossed)})
        return [sample for sample in versioned if sample.completion_mask.any()]


class ExactOld:
    """Exact old logits for `AsyncGRPOTrainer`: wraps its rollout worker and, without adapters, its weight transfer.

    `make_exact` makes one of a trainer's arguments and puts it in.

    Args:
        model: The model that is trained, in a copy of its own whose weights the versions take the place of.
        temperature: The one in the trainer's arguments.
        max_staleness: The one in the trainer's arguments.
        band: ``r_d`` is trained within ``[1 / band, band]``.
        held: The versions; None: patches in memory, in the dtype of `model`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        temperature: float,
        max_staleness: int,
        band: float = 1.5,
        held: HeldVersions | None = None,
    ) -> None:
        self.held, self.device, self.dtype = held or PatchStore(dtype=model.dtype), model.device, model.dtype
        self._scorer = StoredModel(model, self.held, temperature=temperature)
        self._max_staleness, self._band = max_staleness, band
        self.version: PolicyVersion = 0
        self._worker: RolloutWorkerProtocol | None = None

    def worker(self, inner: RolloutWorkerProtocol) -> RolloutWorkerProtocol:
        """Wrap a rollout worker whose samples have versions."""
        self._worker = inner
        return _ScoringWorker(self, inner)

    def transfer(self, inner: WeightTransferProtocol) -> WeightTransferProtocol:
        """Wrap a weight transfer: what it sends is kept as a version, which rollouts name before the engine goes on."""
        return _KeepingTransfer(self, inner)

    def keep(self, weights: Mapping[str, Tensor]) -> None:
        """Keep the weights that the engine has just been sent, as the next version."""
        assert isinstance(self.held, PatchStore), "adapters are not sent"
        self.held.publish(self.version + 1, weights)

    def announce(self) -> None:
        """Tell the worker the version that was sent, while the engine is paused: no turn may begin under the older name."""
        if self._worker is not None:
            self._worker.update_model_version(self.version + 1)

    def moved_to(self, version: PolicyVersion) -> None:
        """Take the trainer's word for its version, and drop what nobody needs any more.

        Raises:
            ExactnessError: The trainer names a version that was not sent.
        """
        if isinstance(self.held, PatchStore) and self.held.versions and version != self.held.versions[-1]:
            raise ExactnessError(
                "the trainer's version is not the one whose weights were sent",
                got=f"version {version}; the last one that was sent is {self.held.versions[-1]}",
                allowed="one call of send_weights for each version",
                fix="call make_exact once, before the trainer begins",
            )
        self.version = version
        self.held.retain(max(0, version - self._max_staleness))

    def scored(self, samples: list[RolloutSample]) -> tuple[list[RolloutSample], dict[str, Any]]:
        """Put OLD into samples, and take what is outside of the band out of their masks; one without a token left is left out.

        A sample that is older than `max_staleness` stays as it is: the trainer drops and counts it where it takes it.

        Raises:
            MissingLogprobError: A sample has no versions.
            VersionEvictedError: A version is not held.
        """
        wanted = [sample for sample in samples if self.version - sample.model_version <= self._max_staleness]
        old = iter(self._scorer.score([_tagged(sample) for sample in wanted]))
        done, num_empty, num_kept, num_tokens, log_r_d = [], 0, 0, 0, 0.0
        for sample in samples:
            if self.version - sample.model_version > self._max_staleness:
                done.append(sample)
                continue
            mask, values = sample.completion_mask.astype(bool), next(old)
            difference = torch.from_numpy(np.where(mask, values - sample.old_log_probs, 0).astype(np.float32))
            kept = mask & band_mask(difference, self._band).numpy()
            num_empty, num_kept, num_tokens = (
                num_empty + (not kept.any()),
                num_kept + int(kept.sum()),
                num_tokens + int(mask.sum()),
            )
            log_r_d += float(difference[torch.from_numpy(kept)].sum())
            if kept.any():
                kept = kept.astype(sample.completion_mask.dtype)
                done.append(replace(sample, logp_mu=sample.old_log_probs, old_log_probs=values, completion_mask=kept))
        told: dict[str, Any] = {"exact/samples_out_of_band_total": float(num_empty)}
        told |= {"exact/in_band": (float(num_kept), float(num_tokens))} if num_tokens else {}
        return done, told | ({"exact/log_r_d": (log_r_d, float(num_kept))} if num_kept else {})


def make_exact(trainer: AsyncGRPOTrainer, model: PreTrainedModel, *, band: float = 1.5) -> ExactOld | None:
    """Let a trainer that has not begun train with exact old logits; on ranks without a rollout worker this does nothing.

    Where TRL sends adapters alone, their folders are the versions, and nothing else is stored.

    Args:
        trainer: With TRL's own rollout worker.
        model: A copy of the model that is trained, on the device that is to score: without wrappers, with the adapter put in
            (`get_peft_model(...).get_base_model()`) where TRL sends adapters alone.
        band: ``r_d`` is trained within ``[1 / band, band]``.

    Raises:
        ConfigError: Another rollout worker or loop, or sampling from a part of the vocabulary.
    """
    if trainer.rollout_worker is None:
        return None
    args, loop = trainer.args, getattr(trainer.rollout_worker, "_loop_cls", type(trainer.rollout_worker))
    if loop is not _AsyncRolloutLoop:
        raise ConfigError(
            "make_exact does not know which versions this rollout worker samples with",
            got=loop.__name__,
            allowed="TRL's own AsyncRolloutWorker, with its own loop",
            fix="let it give VersionedSamples, and wrap it: ExactOld(...).worker(it), as docs/adopt.md shows",
        )
    if args.top_p != 1 or args.top_k > 0 or args.min_p or args.repetition_penalty != 1:
        raise ConfigError(
            "this run of AsyncGRPOTrainer has no exact old logits",
            got=f"top_p={args.top_p}, top_k={args.top_k}, min_p={args.min_p}, repetition_penalty={args.repetition_penalty}",
            allowed="top_p=1, top_k=0, no min_p, repetition_penalty=1",
            fix="sample from the whole vocabulary: what is cut off makes engine and trainer differ on nearly every token",
        )
    steps = StepFolders(Path(trainer._lora_dir), prefix=f"{trainer._lora_name}-v")
    held = AdapterFolders(steps) if trainer._lora_sync else None
    exact = ExactOld(model, temperature=args.temperature, max_staleness=args.max_staleness, band=band, held=held)
    trainer.rollout_worker._loop_cls = VersionedRolloutLoop
    trainer.rollout_worker = exact.worker(trainer.rollout_worker)
    trainer.rollout_queue = trainer.rollout_worker.rollout_buffer
    if trainer.weight_transfer is not None:
        trainer.weight_transfer = exact.transfer(trainer.weight_transfer)
    return exact


def _tagged(sample: RolloutSample) -> TaggedTokens:
    if not isinstance(sample, VersionedSample):
        raise MissingLogprobError(
            "a rollout sample does not say which version sampled each of its tokens",
            got=type(sample).__name__,
            allowed="VersionedSample",
            fix="call make_exact(trainer, model) before trainer.train()",
        )
    lengths = len(sample.input_ids), len(sample.completion_mask), len(sample.old_log_probs), len(sample.versions)
    if len(set(lengths)) > 1:
        raise lengths_differ("input_ids, completion_mask, old_log_probs and versions", lengths)
    return TaggedTokens(token_ids=sample.input_ids, versions=sample.versions, mask=sample.completion_mask.astype(bool))


class _ScoringQueue:
    """A rollout buffer whose samples have OLD when they are taken out of it."""

    def __init__(self, exact: ExactOld, inner: RolloutWorkerProtocol) -> None:
        self._exact, self._inner, self._ready = exact, inner, deque[RolloutSample]()

    def get(self, block: bool = True, timeout: float | None = None) -> RolloutSample:
        if not self._ready:
            waiting = [self._inner.rollout_buffer.get(block, timeout)]
            while len(waiting) < _AT_ONCE:
                try:
                    waiting.append(self._inner.rollout_buffer.get_nowait())
                except queue.Empty:
                    break
            ready, told = self._exact.scored(waiting)
            self._ready.extend(ready)
            self._inner.metrics_queue.put_nowait(told)
        if not self._ready:
            raise queue.Empty
        return self._ready.popleft()

    def qsize(self) -> int:
        return len(self._ready) + int(self._inner.rollout_buffer.qsize())


class _ScoringWorker:
    """TRL's RolloutWorkerProtocol around a worker whose samples are scored.

    It is of the type of that worker: TRL's checkpoints keep the place in the dataset only where `isinstance` finds TRL's own.
    """

    def __init__(self, exact: ExactOld, inner: RolloutWorkerProtocol) -> None:
        self._exact, self._inner = exact, inner
        self.rollout_buffer, self.metrics_queue = _ScoringQueue(exact, inner), inner.metrics_queue

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._inner)

    @property
    def _loop_kwargs(self) -> dict[str, Any]:
        loop_kwargs: dict[str, Any] = self._inner._loop_kwargs  # the trainer's checkpoints read and write it
        return loop_kwargs

    def start(self) -> None:
        self._inner.start()

    def stop(self) -> None:
        self._inner.stop()

    def update_model_version(self, model_version: int) -> None:
        self._exact.moved_to(model_version)
        self._inner.update_model_version(model_version)

    def check_health(self, stale_after_s: float) -> None:
        self._inner.check_health(stale_after_s)


class _KeepingTransfer:
    """TRL's WeightTransferProtocol around a transfer whose weights are kept."""

    def __init__(self, exact: ExactOld, inner: WeightTransferProtocol) -> None:
        self._exact, self._inner = exact, inner

    def init_weight_transfer(self) -> None:
        self._inner.init_weight_transfer()

    def pause(self) -> None:
        self._inner.pause()

    def send_weights(self, iterator: Iterator[tuple[str, Tensor]]) -> None:
        weights: dict[str, Tensor] = {}
        stream = tee(iterator, weights, device=self._exact.device, dtype=self._exact.dtype)
        self._inner.send_weights(stream)
        for _ in stream:  # what the transfer did not want is part of the version, too
            pass
        self._exact.keep(weights)

    def resume(self) -> None:
        self._exact.announce()
        self._inner.resume()

    def destroy(self) -> None:
        self._inner.destroy()
