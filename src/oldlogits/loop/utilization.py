"""How long engine and trainer have worked, and on what: an update's idle shares, and the step times that a simulation needs."""

from __future__ import annotations

from dataclasses import dataclass

from oldlogits.core.engine_stats import EngineStats, Line
from oldlogits.train.reports import TrainerState


@dataclass(frozen=True, slots=True, kw_only=True)
class Utilization:
    """Seconds that engine and trainer have worked, and what the engine has done, since they started."""

    engine_s: float
    trainer_s: float
    num_sampled: int
    num_requests: int
    num_found: int
    waiting_s: float
    decode: Line
    prefill: Line

    def __sub__(self, other: Utilization) -> Utilization:
        """What was done in between."""
        return Utilization(
            engine_s=self.engine_s - other.engine_s,
            trainer_s=self.trainer_s - other.trainer_s,
            num_sampled=self.num_sampled - other.num_sampled,
            num_requests=self.num_requests - other.num_requests,
            num_found=self.num_found - other.num_found,
            waiting_s=self.waiting_s - other.waiting_s,
            decode=self.decode - other.decode,
            prefill=self.prefill - other.prefill,
        )

    def metrics(self, wall_s: float) -> dict[str, float]:
        """Of an update that took `wall_s`; docs/metrics.md."""
        return {
            "throughput/engine_tokens_per_s": self.num_sampled / wall_s,
            "engine/requests": self.num_requests,
            "engine/found_tokens": self.num_found,
            "engine/waiting_s": self.waiting_s,
            **self.decode.metrics("engine/decode"),
            **self.prefill.metrics("engine/prefill"),
            "idle/engine_share": max(0.0, 1 - self.engine_s / wall_s),
            "idle/trainer_share": max(0.0, 1 - self.trainer_s / wall_s),
        }


def busy_of(engine: EngineStats, trainer: TrainerState) -> Utilization:
    """Since they started."""
    return Utilization(
        engine_s=engine.busy_s,
        trainer_s=trainer.busy_s,
        num_sampled=engine.num_decode_tokens,
        num_requests=engine.num_requests,
        num_found=engine.num_prefix_hit_tokens,
        waiting_s=engine.waiting_s,
        decode=engine.decode,
        prefill=engine.prefill,
    )
