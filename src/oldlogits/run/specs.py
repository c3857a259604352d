"""What each part of a run is told: the one place where a recipe is turned into sections and decisions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from oldlogits.config import RunConfig
from oldlogits.config.engine import engine_spec, server_options
from oldlogits.core.backend import BACKENDS, BackendKind
from oldlogits.core.engine import ENGINES
from oldlogits.core.source import SOURCES
from oldlogits.loop.backend import BackendSpec
from oldlogits.train.spec import ScorerSpec, TrainerSpec


def backend_kind(config: RunConfig) -> BackendKind[Any, Any]:
    """The kind of backend that a recipe names.

    Raises:
        ConfigError: There is no such backend.
    """
    return BACKENDS.find(config.runtime.type)()


def trainer_spec(config: RunConfig) -> TrainerSpec:
    """What the trainer of a recipe is told."""
    source = SOURCES.find(config.proximal.source)
    shares_memory = backend_kind(config).steps_engine
    return TrainerSpec(
        trainer=config.trainer,
        model=config.model,
        objective=config.objective,
        proximal=config.proximal,
        versions=config.versions,
        variant=config.variant,
        band=config.band,
        num_updates=config.num_updates,
        max_staleness=config.max_staleness,
        window=config.window,
        seed=config.seed,
        device=config.trainer_device,
        engine_numerics=config.engine.precision,
        stores_versions=source.stores_versions or config.audit.share > 0,
        sends_patches=not shares_memory and config.engine.weight_sync == "auto",
        keeps_average=source.keeps_average,
    )


def scorer_spec(config: RunConfig) -> ScorerSpec | None:
    """What the dedicated scorer of a recipe is told; None: its source needs none."""
    if not SOURCES.find(config.proximal.source).needs_scorer:
        return None
    return ScorerSpec(
        trainer=config.trainer,
        model=config.model,
        window=config.proximal.scorer_versions,
        uncompressed=config.versions.uncompressed,
        seed=config.seed,
        device=config.trainer_device,
    )


def backend_spec(
    config: RunConfig, model_folder: Path, probe_ids: Sequence[int], *, sampler_seed: int, folder: Path
) -> BackendSpec:
    """What the backend of a recipe is told.

    Args:
        config: The recipe.
        model_folder: The Hugging Face folder that the run starts from.
        probe_ids: Fixed tokens on which engine and trainer are compared.
        sampler_seed: The seed of the engine and of simulated latencies.
        folder: The run folder.
    """
    return BackendSpec(
        model_folder=model_folder,
        probe_ids=tuple(probe_ids),
        folder=folder,
        trainer=trainer_spec(config),
        scorer=scorer_spec(config),
        engine=ENGINES.find(config.engine.type)(),
        sampler=engine_spec(config, model_folder.resolve(), seed=sampler_seed),
        servers=server_options(config, folder / "servers"),
        env=config.env,
        rollout=config.rollout,
        lockstep=config.lockstep,
        ray=config.ray,
        seed=config.seed,
    )
