"""The embedded engine in the caller's process: asynchronous calls over the synchronous `EngineCore`."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from oldlogits.core.engine import Generation, KVMode, PauseMode, Sampling
from oldlogits.core.engine_stats import EngineCapabilities, EngineStats
from oldlogits.core.errors import ReceiverBehindError
from oldlogits.core.weights import FullWeights, PolicyVersion, WeightUpdate
from oldlogits.engines.embedded.engine import EngineCore


class EmbeddedEngine:
    """The engine in this process, as a `StepwiseEngine`: whoever owns it calls `drive_once` for it to make progress."""

    def __init__(self, core: EngineCore) -> None:
        self.core = core
        self.capabilities = EngineCapabilities(partials=True)
        self._futures: dict[str, asyncio.Future[Generation]] = {}

    @property
    def idle(self) -> bool:
        """Whether a step would do nothing."""
        return self.core.idle

    async def stats(self) -> EngineStats:
        """Return the counters."""
        return self.core.stats

    def set_quota(self, request_id: str, num_tokens: int | None) -> None:
        """Hold a request once it has sampled so many tokens; None lifts the quota."""
        self.core.set_quota(request_id, num_tokens)

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, request_id: str, *, quota: int | None = None
    ) -> Generation:
        """Sample a completion; waits through pauses, weight updates, and at `quota` sampled tokens until it is raised."""
        self.core.add(request_id, prompt_ids, sampling)
        if quota is not None:
            self.core.set_quota(request_id, quota)
        future: asyncio.Future[Generation] = asyncio.get_running_loop().create_future()
        self._futures[request_id] = future
        try:
            return await future
        finally:
            if self._futures.pop(request_id, None) is not None:
                self.core.abort(request_id)

    def drive_once(self) -> bool:
        """One engine step; returns False if there was nothing to do."""
        if self.core.idle:
            return False
        self._resolve(self.core.step())
        return True

    def reset(self, seed: int) -> None:
        """Sample from here on as an engine that was made with this seed and has the present weights."""
        self.core.reset(seed)

    async def abort(self, request_id: str) -> None:
        """End a request; its `generate` returns what was sampled so far with finish reason "abort"."""
        generation = self.core.abort(request_id)
        if generation is not None:
            self._resolve([(request_id, generation)])

    async def pause(self, mode: PauseMode, kv: KVMode) -> None:
        """Stop sampling; `kv` says what an update does with keys and values."""
        self._resolve(self.core.pause(mode, kv))

    async def partials(self) -> Mapping[str, Generation]:
        """What each request has sampled so far, by request id."""
        return self.core.partials()

    async def update_weights(self, update: WeightUpdate, version: PolicyVersion) -> None:
        """Replace the weights by full ones: an engine in the trainer's process reads the trainer's, and takes no patches."""
        if not isinstance(update, FullWeights):
            raise ReceiverBehindError(
                "this engine takes no patches",
                got=f"patches from version {update.base}",
                allowed="full weights",
                fix="send the full weights of the version",
            )
        self.core.update_weights(update.tensors, version)

    async def resume(self) -> None:
        """Go on sampling."""
        self.core.resume()

    def _resolve(self, finished: Sequence[tuple[str, Generation]]) -> None:
        for request_id, generation in finished:
            future = self._futures.pop(request_id)
            if not future.done():
                future.set_result(generation)
