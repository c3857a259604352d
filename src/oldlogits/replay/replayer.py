"""A trainer that is given recorded batches, one update after another."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from oldlogits.batch.collate import TokenBatch
from oldlogits.batch.sequences import Floats
from oldlogits.config.schema import RunConfig
from oldlogits.core.errors import ReplayError
from oldlogits.core.policies import OLD, find_variant
from oldlogits.core.scoring import Scored
from oldlogits.core.source import SOURCES
from oldlogits.loop.audit import ExactAudit
from oldlogits.loop.task import CHECKED_EVERY
from oldlogits.models.device import configure_process
from oldlogits.record.bus import EventBus
from oldlogits.replay.batches import RecordedBatch, check_vocabulary
from oldlogits.rpc.client import Inline, client
from oldlogits.run.specs import trainer_spec
from oldlogits.sources import check_scored, make_source
from oldlogits.train.calls import TrainerCalls
from oldlogits.train.checkpoint import STATE, of_kind, read_state
from oldlogits.train.step import UpdateResult
from oldlogits.train.trainer import Trainer, TrainerService


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """What a replay starts from.

    Args:
        model: A model folder.
        checkpoint: A checkpoint whose state is taken over; None: there is none, and the model is as in its folder.
        probe_ids: The fixed tokens on which versions are compared with what was published.
    """

    model: Path
    checkpoint: Path | None
    probe_ids: tuple[int, ...]


class Replayer:
    """Trains recorded batches under a recipe.

    Where the tokens were sampled by versions of another trainer, or before a source that scores early was asked, OLD is given
    to it; else its own source provides the proximal policy's log-probs.

    Args:
        config: The recipe.
        start: What it starts from.
        is_own: Whether its versions are those that sampled the tokens.
        scores_old: Whether it is asked for OLD of tokens that it samples, whatever its variant needs.
    """

    def __init__(self, config: RunConfig, start: Start, *, is_own: bool, scores_old: bool = False) -> None:
        source, variant = SOURCES.find(config.proximal.source), find_variant(config.variant)
        self.takes_old = OLD in variant.needs and not (is_own and source.scores_batches)
        spec = replace(trainer_spec(config), versions=replace(config.versions, budget_bytes=0, folder=""), sends_patches=False)
        stores = scores_old or (spec.stores_versions and is_own and not self.takes_old) or config.objective.has_reference
        takes_forward = spec.takes_training_forward and is_own
        spec = replace(spec, stores_versions=stores, takes_training_forward=takes_forward, trains_own_tokens=is_own)
        if spec.measures_band and not is_own:
            raise ReplayError(
                "the band is to follow the noise of this trainer's tokens, and these are another one's",
                got="band = 'auto'",
                allowed="'auto' where nothing of a run's recipe is changed",
                fix="pass --band 1.5",
            )
        configure_process(num_threads=config.trainer.num_threads, seed=config.seed)
        self.trainer = trainer = Trainer(spec, start.model, start.probe_ids)
        self._has_reference = config.objective.has_reference
        self._checked_every = CHECKED_EVERY if takes_forward else 0
        handle = client(TrainerCalls, Inline(TrainerService(trainer, time.perf_counter).call))  # type: ignore[type-abstract]
        self._source = None if self.takes_old else make_source(config.proximal.source, handle, None)
        self._snapshot = make_source("snapshot", handle, None) if scores_old else None
        self._audit = ExactAudit.of(config, handle, EventBus(), time.perf_counter) if spec.proximal.follows_audit else None
        if self._audit is not None and not is_own:
            raise ReplayError(
                "the average is to follow audits, and OLD of these tokens is another trainer's",
                got=f"proximal.decay = '{config.proximal.decay}', proximal.reset = '{config.proximal.reset}'",
                allowed="'audited' where nothing of a run's recipe is changed",
                fix="pass --proximal.decay auto --proximal.reset none",
            )
        self.gradient: list[Tensor] = []
        if start.checkpoint is not None:
            trainer.restore(start.checkpoint)

    @property
    def weights(self) -> list[Tensor]:
        """The masters that are trained."""
        return [weight for weight in self.trainer.live.model.parameters() if weight.requires_grad]

    def follow_gradient(self) -> None:
        """Keep in `gradient` the sum of the gradients of each update's optimizer steps, clipped as they were taken."""
        self.trainer.optimizer.adamw.register_step_pre_hook(lambda optimizer, args, kwargs: self._add_gradient(optimizer))

    def begin(self, version: int) -> None:
        """Publish the weights as the version that the first batch enters training at."""
        self.trainer.live.version = version
        self.trainer.publish()

    async def old(self, recorded: RecordedBatch) -> Floats:
        """Score the tokens of a batch at the versions that sampled them, before it is trained: float32 [loss token]."""
        assert self._snapshot is not None, "it was made for that"
        self._put(recorded)
        tokens = recorded.batch.entering(self.trainer.version)
        scored = await self._snapshot.acquire(tokens)
        assert scored is not None, "a snapshot gives log-probs"
        check_scored(scored, tokens.versions)
        return scored.values

    async def train(self, recorded: RecordedBatch, old: Floats | None, oldest_needed: int) -> UpdateResult:
        """Train one batch, and publish what comes out.

        Args:
            recorded: The batch; it enters training at its own version, which may be later than the one that was published.
            old: float32 [loss token]; OLD, where the replayer takes it.
            oldest_needed: The oldest version of the tokens that follow.
        """
        if self.trainer.version != recorded.version:
            self.begin(recorded.version)
        self._put(recorded)
        self.gradient = []
        tokens = recorded.batch.entering(recorded.version, checked_every=self._checked_every)
        scored = await self._source.acquire(tokens) if self._source is not None else _given(recorded, old)
        if scored is not None:
            check_scored(scored, tokens.versions)
        if self._has_reference:
            self.trainer.score_reference()
        if self._audit is not None:
            await self._audit.score(tokens)
        result = self.trainer.train(scored)
        self.trainer.publish()
        self.trainer.retain(min(oldest_needed, self.trainer.version))
        return result

    def differs_from(self, checkpoint: Path) -> float:
        """Compare the masters with those of a checkpoint: the largest difference; exactly 0 where all bits are the same."""
        model = self.trainer.live.model
        masters = of_kind("master", read_state(checkpoint / STATE, model))
        pairs = [(one, masters[name]) for name, one in model.named_parameters() if name in masters]
        if all(torch.equal(one.detach(), other) for one, other in pairs):
            return 0.0
        return max(float((one.detach() - other).abs().max()) for one, other in pairs)

    def _put(self, recorded: RecordedBatch) -> None:
        check_vocabulary(recorded, self.trainer.live.model.get_input_embeddings().weight.shape[0])
        self.trainer.put_batch(recorded.batch)

    def _add_gradient(self, optimizer: torch.optim.Optimizer) -> None:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        found = [torch.zeros_like(weight) if weight.grad is None else weight.grad.detach().clone() for weight in weights]
        self.gradient = [a + b for a, b in zip(self.gradient, found, strict=True)] if self.gradient else found


def _given(recorded: RecordedBatch, old: Floats | None) -> Scored:
    batch: TokenBatch = recorded.batch
    if old is None:
        raise ReplayError(
            "the variant needs log-probs of OLD, and the record has none",
            got=f"{recorded.name} without logp_old",
            allowed="a column logp_old, or a variant that needs no OLD",
            fix="write logp_old: the trainer's own log-probs at the version that sampled each token; or pass "
            "--variant decoupled_async, whose ASYNC is computed here",
        )
    versions = batch.version[batch.loss_mask]
    return Scored(policy=OLD, values=old, computed_at=versions, num_switches=len(np.unique(versions)))
