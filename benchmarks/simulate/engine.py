"""Engines that only pass time: continuous batching in whole steps, a cache that a weight update empties.

    generate -> waiting --slot free, step boundary--> prefill, then one token a step with all others -> spans by version

Between two changes of the batch all steps are alike, so they are one timer, however many they are.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from benchmarks.simulate.scenario import EngineTimes


@dataclass(slots=True, kw_only=True)
class Cached:
    """What an engine has of one trajectory.

    Args:
        group_id: Its group, which shares the prompt.
        num_prompt: Tokens of the prompt.
        num_tokens: Tokens so far.
        num_cached: Of these, with keys and values; those of `version`.
        version: See `num_cached`; -1: none are cached.
        is_active: Whether one of its turns decodes.
    """

    group_id: str
    num_prompt: int
    num_tokens: int = 0
    num_cached: int = 0
    version: int = -1
    is_active: bool = False


@dataclass(slots=True, kw_only=True)
class _Request:
    trajectory_id: str
    cached: Cached
    num_left: int
    target: int = 0  # the engine's step at whose end it is done
    attends_to: int = 0  # tokens, on average over its steps
    spans: list[tuple[int, int]] = field(default_factory=list)  # version, tokens
    done: asyncio.Future[list[tuple[int, int]]]


class Engine:
    """One engine.

    Args:
        times: Of its steps.
        max_num_seqs: Sequences in a step.
        recompute: Whether a weight update empties the cache.
        common_tokens: Tokens at the beginning of every prompt.
        found_share: Share of every prompt that the cache holds; None: what it holds is modelled.
    """

    def __init__(
        self,
        times: EngineTimes,
        *,
        max_num_seqs: int,
        recompute: bool,
        common_tokens: int = 0,
        found_share: float | None = None,
    ) -> None:
        self._times, self._num_slots, self._recompute = times, max_num_seqs, recompute
        self._loop = asyncio.get_running_loop()
        self._numbers = itertools.count()
        self._waiting: deque[_Request] = deque()
        self._active: list[tuple[int, int, _Request]] = []  # a heap by target
        self._context = 0  # tokens that the active sequences attend to
        self._common, self._found_share = common_tokens, found_share
        self._held: dict[str, Cached] = {}  # trajectories that have a slot, or left theirs as it is; least recent first
        self._prompts: set[str] = set()  # groups whose prompt is in the cache
        self._timer: asyncio.TimerHandle | None = None
        self._planned = 0  # steps until the timer
        self._from_s = self._one_s = 0.0  # when they began, and what one takes
        self._is_paused = False
        self.factor = 1.0  # how much longer than usual everything takes
        self.num_assigned = 0
        self.version = 0
        self.busy_s = 0.0
        self.num_steps = self.num_decoded = self.num_prefilled = 0

    def generate(self, trajectory_id: str, cached: Cached, num_tokens: int) -> asyncio.Future[list[tuple[int, int]]]:
        """Sample `num_tokens`; the result says how many with each version."""
        request = _Request(trajectory_id=trajectory_id, cached=cached, num_left=num_tokens, done=self._loop.create_future())
        self._waiting.append(request)
        self._change()
        return request.done

    def pause(self) -> None:
        """Rest, from now on; the step that is under way ends first, in no time."""
        if self._timer is not None:
            self._timer.cancel()
            self._end_steps(min(self._planned, max(0, math.ceil((self._loop.time() - self._from_s) / self._one_s - 1e-9))))
        self._is_paused = True

    def partials(self) -> Iterable[tuple[str, list[tuple[int, int]]]]:
        """What the running requests have sampled so far."""
        for _, _, request in self._active:
            self._note(request)
            yield request.trajectory_id, request.spans

    def update(self, version: int) -> None:
        """Take over a version, while paused."""
        active = [request for _, _, request in sorted(self._active, key=lambda entry: entry[:2])]
        for request in active:
            self._note(request)
        self.version = version
        if self._recompute:
            for request in active:
                request.cached.is_active = False
            self._active.clear()
            self._held.clear()
            self._context = 0
            self._prompts.clear()
            self._waiting.extendleft(reversed(active))

    def resume(self) -> None:
        """Go on."""
        self._is_paused = False
        self._change()

    def _note(self, request: _Request) -> None:
        """Count what an active request has sampled with the present version."""
        left = request.target - self.num_steps
        self._grew(request, request.num_left - left)

    def _grew(self, request: _Request, num_tokens: int) -> None:
        if num_tokens:
            if request.spans and request.spans[-1][0] == self.version:
                request.spans[-1] = (self.version, request.spans[-1][1] + num_tokens)
            else:
                request.spans.append((self.version, num_tokens))
        request.num_left -= num_tokens
        cached = request.cached
        cached.num_tokens += num_tokens
        cached.num_cached, cached.version = cached.num_tokens, self.version

    def _change(self) -> None:
        """The batch may change: now if the engine stands, else at the end of the step under way."""
        if self._is_paused:
            return
        if self._timer is None:
            self._go()
            return
        if len(self._active) >= self._num_slots:
            return
        steps = max(1, math.ceil((self._loop.time() - self._from_s) / self._one_s - 1e-9))
        if steps < self._planned:
            self._timer.cancel()
            self._plan(steps)

    def _go(self) -> None:
        """Admit and prefill, then decode until the next sequence ends."""
        prefill_s, message_s = self._admit()
        self._timer = None
        if not self._active:
            return
        self.busy_s += prefill_s
        self._from_s = self._loop.time() + prefill_s + message_s
        t = self._times
        self._one_s = self.factor * (t.step_s + len(self._active) * t.sequence_s + self._context * t.context_s)
        self._plan(self._active[0][0] - self.num_steps)

    def _plan(self, steps: int) -> None:
        self._planned = steps
        self._timer = self._loop.call_at(self._from_s + steps * self._one_s, self._stop)

    def _stop(self) -> None:
        self._end_steps(self._planned)
        if not self._is_paused:
            self._go()

    def _end_steps(self, steps: int) -> None:
        self._timer = None
        self.num_steps += steps
        self.num_decoded += steps * len(self._active)
        self.busy_s += steps * self._one_s
        while self._active and self._active[0][0] <= self.num_steps:
            _, _, request = heapq.heappop(self._active)
            self._context -= request.attends_to
            request.cached.is_active = False
            self._note(request)
            if not request.done.done():
                request.done.set_result(request.spans)

    def _admit(self) -> tuple[float, float]:
        """Fill the free slots; the seconds of the prefill, and of taking and answering requests."""
        num_new, num_missing = 0, 0
        while self._waiting and len(self._active) < self._num_slots:
            request = self._waiting.popleft()
            num_new += 1
            num_missing += self._missing(request.cached)
            self._hold(request)
            request.target = self.num_steps + request.num_left
            request.attends_to = request.cached.num_tokens + request.num_left // 2
            self._context += request.attends_to
            heapq.heappush(self._active, (request.target, next(self._numbers), request))
        self.num_prefilled += num_missing
        t = self._times
        prefill_s = (t.wave_s if num_new else 0.0) + num_missing * t.prefill_s
        return self.factor * prefill_s, self.factor * num_new * t.message_s

    def _hold(self, request: _Request) -> None:
        """Give it a slot; where none is left, the trajectory loses its entries that has not run for longest."""
        self._held.pop(request.trajectory_id, None)
        self._held[request.trajectory_id] = request.cached
        request.cached.is_active = True
        if len(self._held) > self._num_slots:
            oldest = next(id for id, cached in self._held.items() if not cached.is_active)
            self._held.pop(oldest).version = -1

    def _missing(self, cached: Cached) -> int:
        """Tokens to prefill: what was read since, or all after a weight update; a group's prompt once."""
        if self._found_share is not None:
            return round(cached.num_tokens * (1 - self._found_share))
        kept = cached.num_cached if cached.version == self.version or (cached.version >= 0 and not self._recompute) else 0
        if not kept and self._prompts:
            kept = cached.num_prompt if cached.group_id in self._prompts else min(self._common, cached.num_prompt)
        self._prompts.add(cached.group_id)
        return max(0, cached.num_tokens - kept)
