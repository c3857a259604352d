"""What each part of a run is told: the one place where a recipe is turned into sections and decisions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from oldlogits.config.schema import RunConfig
from oldlogits.core.backend import BACKENDS, BackendKind
from oldlogits.core.engine import ENGINES, EngineSpec, ServerOptions, Timeouts
from oldlogits.core.source import SOURCES
from oldlogits.engines.embedded.numerics import Numerics
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
        correction=config.correction,
        proximal=config.proximal,
        versions=config.versions,
        variant=config.variant,
        band=config.fixed_band,
        measures_band=config.band == "auto",
        num_updates=config.num_updates,
        max_staleness=config.max_staleness,
        window=config.window,
        seed=config.seed,
        device=config.trainer_device,
        max_context=config.env.max_episode_tokens,
        engine_numerics=view_numerics(config),
        stores_versions=source.stores_versions or config.audit.share > 0 or config.objective.has_reference,
        sends_patches=not shares_memory and config.engine.weight_sync == "auto",
        keeps_average=source.keeps_average,
        takes_training_forward=config.takes_training_forward,
    )


def view_numerics(config: RunConfig) -> Numerics:
    """The engine's numerics as the trainer needs them; fp32: it computes as the trainer does.

    An engine that rounds to bf16 rounds nothing where the forward weights are bf16 already; adapters it merges first.
    """
    is_rounded = config.model.forward_dtype == "bf16" and not config.model.lora_rank
    return "fp32" if config.engine.precision == "bf16" and is_rounded else config.engine.precision


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
        max_context=config.env.max_episode_tokens,
    )


def engine_spec(config: RunConfig, model_folder: Path, *, seed: int = 0) -> EngineSpec:
    """What the engine of a recipe is told, over a model folder."""
    return EngineSpec(
        model_path=str(model_folder),
        numerics=config.engine.precision,
        max_num_seqs=config.engine.max_num_seqs,
        max_context=config.env.max_episode_tokens,
        seed=seed,
        adapter_scale=config.model.adapter_scale,
        device=config.engine_device,
        returns_routing=config.model.routing != "off",
    )


def server_options(config: RunConfig, log_folder: Path = Path()) -> ServerOptions:
    """What servers of a recipe are told; their messages go to `log_folder`."""
    e = config.engine
    return ServerOptions(
        protocol=e.server,
        urls=e.urls,
        token_env=e.token_env,
        num_servers=e.num_servers,
        flags=e.flags,
        python=e.python,
        log_folder=log_folder,
        timeouts=Timeouts(
            recover_s=e.recover_s,
            heartbeat_s=config.runtime.heartbeat_timeout_s,
            request_s=e.request_timeout_s,
            control_s=e.control_timeout_s,
            start_s=e.start_timeout_s,
            max_restarts=e.max_restarts,
        ),
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
        runtime=config.runtime,
        lockstep=config.lockstep,
        ray=config.ray,
    )
