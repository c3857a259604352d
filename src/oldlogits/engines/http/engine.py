"""Servers over HTTP as a `RolloutEngine`: one or several, attached or started by the run, of whatever protocol.

    generate -> choose the server with the fewest requests -> its protocol's `generate` -> spans -> Generation
                  ^                                                 | aborted, cut or overdue
                  '--- again, with prompt + what was kept ----------'

Tokens of weights that are not of this run (a server that was started again, or that another trainer updates) are thrown away,
and the server is given the current weights. A request that is cut keeps what was sampled under versions of this run and reached
us; what did not reach us is sampled anew.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from oldlogits.core.engine import (
    EngineSpec,
    FinishReason,
    Generation,
    KVMode,
    PauseMode,
    Sampling,
    Timeouts,
    check_update,
    trajectory_of,
)
from oldlogits.core.engine_stats import EngineCapabilities, EngineStats
from oldlogits.core.errors import ConfigError
from oldlogits.core.server import GenerateRequest, ServerFailedError, ServerProtocol, SharedWeights
from oldlogits.core.weights import PolicyVersion, WeightUpdate
from oldlogits.engines.http.fleet import Fleet
from oldlogits.engines.http.pending import PendingRequest, unless
from oldlogits.engines.http.replica import Attempt, Replica
from oldlogits.engines.http.supervision import Supervisor
from oldlogits.engines.prompts import flat
from oldlogits.engines.shared_memory import OnThisHost, WeightTransport

REMEMBERED: Final = 65_536
"""Trajectories of which it is known where they were sampled last."""
SAME_WEIGHTS: Final[Mapping[str, float]] = {"fp32": 1e-3, "bf16": 0.5}
"""Nats, by arithmetic: the largest difference between two servers' log-probs of a prompt under the same weights."""


class HttpEngine:
    """Servers behind `RolloutEngine`. `start` it, run `supervise` beside it, and `close` it.

    Args:
        spec: The numerics, adapters and size that the run needs; a server with others is refused.
        weights: Brings weights to where the servers read them; by default they run on this machine.
    """

    def __init__(
        self, replicas: Sequence[Replica], spec: EngineSpec, timeouts: Timeouts, weights: WeightTransport | None = None
    ) -> None:
        self._spec = spec
        self.fleet = Fleet(replicas, timeouts)
        self._supervisor = Supervisor(self.fleet, spec, timeouts, supply=self._supply)
        self._run = secrets.token_hex(4)
        self._version: PolicyVersion = -1
        self._weights: WeightTransport = weights or OnThisHost()
        self._told: SharedWeights | None = None
        self._last_replicas: dict[str, Replica] = {}  # of trajectories
        self._requests: dict[str, PendingRequest] = {}
        self._probes = itertools.count()
        self._probe: tuple[PolicyVersion, GenerateRequest, tuple[float, ...]] | None = None  # the last one
        self._count = EngineStats()
        self._looked_at, self._was_busy = time.perf_counter(), False

    async def start(self) -> None:
        """Connect."""
        await self._supervisor.start()

    async def supervise(self) -> None:
        """Watch the servers and take back those that failed; runs beside the engine."""
        await self._supervisor.supervise()

    async def close(self) -> None:
        """Leave no process, connection or file."""
        self._weights.close()
        await self.fleet.close()

    @property
    def capabilities(self) -> EngineCapabilities:
        """What these servers can do."""
        infos = [replica.info for replica in self.fleet.replicas if replica.info is not None]
        return EngineCapabilities(
            partials=True,
            arithmetic="bf16" if any(info.arithmetic == "bf16" for info in infos) else "fp32",
            num_replicas=len(self.fleet.replicas),
            num_host_copies=self._weights.num_copies,
        )

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling, request_id: str) -> Generation:
        """Sample a completion; waits through pauses, weight updates and servers that come back."""
        if request_id in self._requests:
            raise ConfigError("a request id is in use", got=request_id, allowed="unique ids", fix="number the turns")
        if not 0 < len(prompt_ids) < self._spec.max_context:
            allowed = f"1 to {self._spec.max_context - 1} tokens"
            raise ConfigError("the prompt does not fit", got=f"{len(prompt_ids)} tokens", allowed=allowed, fix="shorten it")
        if self._version < 0:
            raise ConfigError(
                "no weights were given", got=request_id, allowed="update_weights first", fix="pause, update, resume"
            )
        self._requests[request_id] = request = PendingRequest(id=request_id, prompt_ids=flat(prompt_ids), sampling=sampling)
        try:
            while True:
                replica = await self._choose(request)
                reason = "abort" if request.is_aborted else await self._attempt(request, replica)
                if reason is not None:
                    return replace(request.kept, finish_reason=reason)
        finally:
            del self._requests[request_id]

    async def _choose(self, request: PendingRequest) -> Replica:
        """Probes go to one server after the other; turns stay where the trajectory's keys and values are, if they can."""
        if request.sampling.prompt_logprobs:
            return await self.fleet.choose(spread=next(self._probes))
        name = trajectory_of(request.id)
        replica = self._last_replicas[name] = await self.fleet.choose(before=self._last_replicas.pop(name, None))
        if len(self._last_replicas) > REMEMBERED:
            del self._last_replicas[next(iter(self._last_replicas))]
        return replica

    async def _attempt(self, request: PendingRequest, replica: Replica) -> FinishReason | None:
        """Send a request to a server; returns why it ended, or None if it is to be sent again."""
        asked = self._asked(request)
        attempt = Attempt(id=asked.request_id, version=self._version, num_kept=len(request.kept.output_ids))
        request.attempt = attempt
        replica.attempts.add(attempt)
        self._look_at_clock()
        try:
            answer = await unless(attempt.cut.wait(), replica.server.generate(asked))  # leaving closes the connection
        except ServerFailedError as failure:
            await self.fleet.suspect(replica, str(failure))
            return None
        finally:
            request.attempt = None
            replica.attempts.discard(attempt)
            attempt.ended.set()
            self._look_at_clock()
        if answer is None:
            return None
        replica.answered_at = time.monotonic()
        if not all(attempt.version <= span.version <= self._version for span in answer.spans):
            versions = ", ".join(named(span.version) for span in answer.spans)
            self.fleet.fail(replica, f"it sampled with weights of {versions}, not with this run's version {self._version}")
            return None
        request.keep(answer)
        if replica.num_received is not None:
            replica.num_received += len(answer.output_ids)
        self._count.num_steps += 1
        self._count.num_decode_tokens += len(answer.output_ids)
        self._count.num_prefill_tokens += len(asked.token_ids)
        if asked.sampling.prompt_logprobs:
            self._probe = (self._version, asked, answer.prompt_logprobs)
        if answer.finish_reason == "abort" and not attempt.why:
            await asyncio.sleep(0.1)  # somebody else aborted it, such as a server that ends: do not press
        return request.ended_by(answer.finish_reason, self._spec.max_context)

    def _asked(self, request: PendingRequest) -> GenerateRequest:
        """The prompt and what was kept of it, under an id that no server knows."""
        tokens = (*request.prompt_ids, *request.kept.output_ids)
        room = min(request.sampling.max_tokens - len(request.kept.output_ids), self._spec.max_context - len(tokens))
        return GenerateRequest(
            request_id=f"{self._run}-{request.id}-{next(request.numbers)}",
            token_ids=tokens,
            sampling=replace(request.sampling, max_tokens=room),
        )

    async def abort(self, request_id: str) -> None:
        """End a request; its `generate` returns what was sampled so far with finish reason "abort"."""
        request = self._requests.get(request_id)
        if request is None:
            return
        request.is_aborted = True
        if request.attempt is not None:
            await self.fleet.abort("end", [request.attempt])

    async def pause(self, mode: PauseMode, kv: KVMode) -> None:
        """Stop sampling; the servers are idle on return."""
        if kv != "recompute":
            raise ConfigError("servers share stale keys and values", got=kv, allowed="recompute", fix="engine.kv = 'recompute'")
        if mode == "abort":
            for request in self._requests.values():
                request.is_aborted = True
        await self.fleet.pause(mode)
        if self._spec.returns_routing:
            await self.partials()  # an answer has the experts of one version
        self._look_at_clock()

    async def partials(self) -> Mapping[str, Generation]:
        """While paused: what each running request has sampled so far. It is aborted, and sent again on `resume`."""
        attempts = [request.attempt for request in self._requests.values() if request.attempt is not None]
        await self.fleet.abort("resubmit", attempts)
        await asyncio.sleep(0)  # those that are over by now have returned
        return {request.id: replace(request.kept, finish_reason="abort") for request in self._requests.values()}

    async def update_weights(self, update: WeightUpdate, version: PolicyVersion) -> None:
        """Give every server new weights; one that fails is given them when it comes back."""
        check_update(version, over=self._version, is_paused=self.fleet.paused)
        async with self.fleet.lock:  # no server reads the copy that is replaced
            self._told = await self._weights.take(update, version)
            self._version = version
            await self.fleet.update(self._told)

    async def resume(self) -> None:
        """Go on sampling."""
        await self.fleet.resume()
        self._look_at_clock()

    async def stats(self) -> EngineStats:
        """Counters, as far as they are seen from here: a step is an answer."""
        self._look_at_clock()
        return replace(self._count, version=self._version)

    async def _supply(self, server: ServerProtocol) -> str:
        """Give a server that came back the current weights, if it has others, and ask it the last probe again."""
        if self._version < 0:
            return "connected"
        version, done = await server.version(), "it kept its weights"
        if version != self._version:
            assert self._told is not None, "there is a version"
            await server.pause("abort")
            await server.update(self._told)
            await server.resume()
            done = f"it had weights of {named(version)} and was given version {self._version}"
        if self._probe is not None and self._probe[0] == self._version:
            _, asked, expected = self._probe
            answer = await server.generate(replace(asked, request_id=f"{asked.request_id}-{secrets.token_hex(4)}"))
            error = float(np.abs(np.subtract(answer.prompt_logprobs, expected)).max())
            if not error <= SAME_WEIGHTS[self.capabilities.arithmetic]:
                raise ServerFailedError(f"its log-probs are not those of version {self._version}: off by {error:.1e} nats")
        return done

    def _look_at_clock(self) -> None:
        """Count the seconds in which a server had something to do."""
        now = time.perf_counter()
        self._count.busy_s += (now - self._looked_at) * self._was_busy
        self._looked_at, self._was_busy = now, self.fleet.num_running > 0 and not self.fleet.paused


def named(version: PolicyVersion) -> str:
    """Name a version that a server has."""
    return f"version {version}" if version >= 0 else "no version of this run"
