"""The change of versions: pause the engine, give it the new weights, let it go on, and check what it holds.

pause -> source.on_paused -> update_weights -> resume -> source.on_published
                                                   '---> probe, consistency checks
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from oldlogits.config.episodes import SamplingConfig
from oldlogits.config.systems import EngineConfig
from oldlogits.core.engine import RolloutEngine, trajectory_of
from oldlogits.core.engine_stats import EngineStats
from oldlogits.core.errors import ConfigError, ReceiverBehindError
from oldlogits.core.source import LogprobSource
from oldlogits.core.weights import PatchWeights
from oldlogits.loop.backend import Backend
from oldlogits.loop.probe import allowed_error, probe
from oldlogits.record.bus import EventSink
from oldlogits.record.events import Probed, WeightsUpdated
from oldlogits.rollout.journal.journal import Journal
from oldlogits.rollout.turns import sampled_segments
from oldlogits.train.reports import PublishedVersion


class WeightSync:
    """Brings the engine from one version to the next, and tells the source of every pause and every published version.

    Engine and trainer are compared on the fixed prompt `probe_ids`.

    Raises:
        ConfigError: The source needs to know what running turns have sampled, and the engine does not tell.
    """

    def __init__(
        self,
        config: EngineConfig,
        sampling: SamplingConfig,
        probe_ids: Sequence[int],
        backend: Backend,
        source: LogprobSource,
        events: EventSink,
        journal: Journal,
    ) -> None:
        check_partials(source, backend.engine)
        self._config, self._sampling, self._probe_ids, self._backend = config, sampling, probe_ids, backend
        self._source, self._events, self._journal = source, events, journal
        self._paused: tuple[float, float] | None = None
        self._checking: asyncio.Task[None] | None = None
        self.stats: EngineStats | None = None
        """The engine's counters at the last change of versions, where time is real."""

    async def pause(self) -> tuple[float, float]:
        """Bring the engine to rest until the next `give`, and tell the source what unfinished turns have sampled so far.

        Returns:
            Since when the engine stands still, and the seconds that it took to come to rest.
        """
        await self.checked()
        engine, clock, started = self._backend.engine, self._backend.clock, self._backend.clock()
        await engine.pause("keep", self._config.kv)
        self._paused = clock(), clock() - started
        can = engine.capabilities
        if can.partials and (self._source.needs_partials or not can.growth):
            temperature, partials = self._sampling.temperature, await engine.partials()
            running = {trajectory_of(i): sampled_segments(g, temperature) for i, g in partials.items()}
            self._journal.running(running)
            if self._source.needs_partials:
                await self._source.on_paused(running)
        return self._paused

    async def give(self, published: PublishedVersion) -> float:
        """Give the engine the new weights, let it go on, and check it; returns the seconds that it stood still.

        An engine that does not go on from what it holds is given all weights. The engine is paused unless it is already.
        Where time is real, the check has only begun: see `checked`.

        Raises:
            ProbeError: The engine does not hold the version as the trainer published it.
        """
        engine, clock, version = self._backend.engine, self._backend.clock, published.version
        paused_at, pause_s = self._paused or await self.pause()
        started, sent, refused = clock(), published.update, ""
        num_bytes = sent.num_bytes
        try:
            await engine.update_weights(sent, version)
        except ReceiverBehindError as error:
            sent, refused = await self._backend.trainer.full_weights(), str(error)
            num_bytes += sent.num_bytes
            await engine.update_weights(sent, version)
        if self._backend.real_time:  # it stands still, and answers at once
            self.stats = await engine.stats()
        await engine.resume()
        resumed, self._paused = clock(), None
        stall_s = resumed - paused_at
        self._events.emit(
            WeightsUpdated(
                version=version,
                sent="patch" if isinstance(sent, PatchWeights) else "full",
                bytes=num_bytes,
                refused=refused,
                pause_s=pause_s,
                load_s=resumed - started,
                stall_s=stall_s,
            )
        )
        if self._backend.real_time:  # its first step computes all keys and values anew: nobody waits for that
            self._checking = checking = asyncio.create_task(self._check(published))
            checking.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # seen, if the run ends by another
        else:
            await self._check(published)
        await self._source.on_published(version, published.update, published.probe_logps)
        return stall_s

    async def checked(self) -> None:
        """Wait until the engine has shown that it holds the version that it was given last.

        Raises:
            ProbeError: It does not.
        """
        if self._checking is not None:
            await asyncio.shield(self._checking)  # whoever is cancelled here leaves it to the checkpoint that follows
            self._checking = None

    async def _check(self, published: PublishedVersion) -> None:
        """Probe the engine, every replica of it, and ask the trainer for its checks; the worst of each counts."""
        config, can = self._config, self._backend.engine.capabilities
        allowed = allowed_error(config.precision, config.probe_tolerance, published, arithmetic=can.arithmetic)
        expected, version = published.engine_probe_logps, published.version
        results = [
            await probe(self._backend.engine, self._probe_ids, expected, version=version, allowed=allowed)
            for _ in range(can.num_replicas)
        ]
        result = max(results, key=lambda result: result.max_abs_error)
        of_trainer = (await self._backend.trainer.state()).consistency
        worst = np.fmax(of_trainer.publish_max_abs_error, self._source.consistency_max_abs_error)
        self._events.emit(
            Probed(
                version=published.version,
                **asdict(result),
                consistency_publish_max_abs_error=float(worst),
                consistency_lag0_max_abs_error=of_trainer.lag0_max_abs_error,
                consistency_rescored_max_abs_error=of_trainer.rescored_max_abs_error,
                packing_mean_abs_error=of_trainer.packing_mean_abs_error,
                packing_max_abs_error=of_trainer.packing_max_abs_error,
                rounding_mean_abs_error=of_trainer.rounding_mean_abs_error,
                rounding_max_abs_error=of_trainer.rounding_max_abs_error,
                num_digests=of_trainer.num_digests,
            )
        )


def check_partials(source: LogprobSource, engine: RolloutEngine) -> None:
    """Refuse a source that scores before the step, where the engine does not tell what it has sampled by then."""
    if source.needs_pause and not engine.capabilities.partials:
        raise ConfigError(
            f"{type(source).__name__} scores what running turns have sampled, and this engine does not tell",
            got="an engine without partials",
            allowed="an engine with partials, or another source",
            fix="proximal.source = 'snapshot'",
        )
