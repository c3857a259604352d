"""Builds the loop of a recipe: its source, its weight sync and its checks."""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import NDArray

from oldlogits.config.schema import RunConfig
from oldlogits.core.policies import find_variant
from oldlogits.core.weights import PolicyVersion
from oldlogits.loop.audit import ExactAudit
from oldlogits.loop.backend import Backend
from oldlogits.loop.calibration import Calibrator
from oldlogits.loop.loop import Loop
from oldlogits.loop.task import LoopConfig, Task
from oldlogits.loop.weight_sync import WeightSync
from oldlogits.record.events import RunStarted
from oldlogits.record.recording import Recording
from oldlogits.rollout.journal.journal import Journal
from oldlogits.rollout.journal.records import SpanScored
from oldlogits.sources import make_source


def make_loop(config: RunConfig, task: Task, backend: Backend, recording: Recording, journal: Journal) -> Loop:
    """Build the loop of a recipe."""
    source = make_source(config.proximal.source, backend.trainer, backend.scorer, partial(_keep, journal))
    return Loop(
        LoopConfig.of(config),
        task,
        backend,
        source,
        sync=WeightSync(config.engine, config.sampling, task.probe_ids, backend, source, recording.events, journal),
        audit=ExactAudit.of(config, backend.trainer, recording.events, backend.clock),
        calibrator=Calibrator.of(config, backend.trainer, recording.events),
        recording=recording,
        journal=journal,
    )


def _keep(journal: Journal, trajectory_id: str, version: PolicyVersion, values: NDArray[np.float32]) -> None:
    journal.note(SpanScored(episode=trajectory_id, version=version, values=tuple(values.tolist())))


async def run_started(config: RunConfig, backend: Backend, *, version: PolicyVersion, num_kept: int | None) -> RunStarted:
    """The event with which a run begins, or goes on from `version`; `num_kept` is what `RunStarted` says."""
    variant, objective, trainer = find_variant(config.variant), config.objective, await backend.trainer.state()
    truncates = objective.clip == "truncated"
    return RunStarted(
        version=version,
        variant=config.variant,
        r_d=str(variant.r_d),
        r_s=str(variant.r_s),
        corrects_mismatch=variant.corrects_mismatch,
        source=config.proximal.source,
        runtime=config.runtime.type,
        seed=config.seed,
        denominator=objective.loss_aggregation,
        band=None if config.band == "auto" else config.band,
        eps_low=None if truncates else objective.eps_low,
        eps_high=None if truncates else objective.eps_high,
        truncation=objective.is_cap if truncates else None,
        max_staleness=config.max_staleness,
        group_size=config.rollout.group_size,
        prompts_per_update=config.rollout.prompts_per_update,
        model=config.model.path,
        num_parameters=trainer.num_parameters,
        num_trained=trainer.num_trained,
        numerics=config.engine.precision,
        num_kept=num_kept,
    )
