"""What an embedded engine counts while it steps."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from oldlogits.core.engine_stats import EngineStats, Line
from oldlogits.core.weights import PolicyVersion


@dataclass(slots=True, kw_only=True)
class Counters:
    """Counts since the engine was built; `EngineStats` says what each is."""

    steps: int = 0
    requests: int = 0
    decode_tokens: int = 0
    prefill_tokens: int = 0
    hit_tokens: int = 0
    decodes: Line = field(default_factory=Line)
    prefills: Line = field(default_factory=Line)
    busy_s: float = 0.0
    built_at: float = field(default_factory=time.perf_counter)

    def stats(self, version: PolicyVersion) -> EngineStats:
        """The counters, with the version of the engine's weights."""
        return EngineStats(
            version=version,
            num_steps=self.steps,
            num_decode_tokens=self.decode_tokens,
            num_prefill_tokens=self.prefill_tokens,
            num_prefix_hit_tokens=self.hit_tokens,
            busy_s=self.busy_s,
            idle_s=time.perf_counter() - self.built_at - self.busy_s,
            num_requests=self.requests,
            decode=self.decodes,
            prefill=self.prefills,
        )
