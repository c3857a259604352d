"""The embedded engine: continuous batching over a static cache, one version per token, no dependency but torch.

One step of `EngineCore`, who feeds whom:

    add -> waiting --admit--> slots --prefill--> rows --decode--> finished -> Generation
             ^                  |   copy of what another slot holds: prefix index
             '-- update_weights with kv = "recompute" sends every running request back here, with its slot

Prefill computes keys and values of all tokens but the newest; the newest is the input of the decode step, the one
place where tokens are sampled. Prefill and the first decode step of a request are one step of the engine.

Requests and their tokens are kept on the CPU. On a GPU a step sends it the newest tokens, positions and random numbers,
which are drawn on the CPU as ever, and waits once: for the tokens that were drawn, with their log-probs.

Requests share entries of the current version only. With kv = "stale" trajectories keep their own over an update: a running
request goes on with them, and so does a next turn that finds them in its slot; what is sampled over them is "mixed". Thus
an entry of older versions that a token attends to is one that an earlier token of its trajectory attended to, or added.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from oldlogits.core.engine import EngineSpec, FinishReason, Generation, KVMode, PauseMode, Sampling, check_update, trajectory_of
from oldlogits.core.engine_stats import EngineStats, piece
from oldlogits.core.errors import ConfigError
from oldlogits.core.weights import PolicyVersion
from oldlogits.engines.embedded.attention import PrefillAttention
from oldlogits.engines.embedded.decode_step import DecodeStep, Joined
from oldlogits.engines.embedded.decoder import Decoder
from oldlogits.engines.embedded.model_folder import decoder_config, read_weights
from oldlogits.engines.embedded.numerics import check_numerics
from oldlogits.engines.embedded.placement import Placement
from oldlogits.engines.embedded.prefix import Match
from oldlogits.engines.embedded.sampling import Head
from oldlogits.engines.embedded.slots import Request, RoutingCache, SlotTable, check_request
from oldlogits.models.adapters import merge
from oldlogits.models.device import find_device, wait_for

PREFILL_TOKENS: Final = 4096
"""The most tokens, padding included, of one prefill pass; a longer sequence goes alone."""

JOINED_TOKENS: Final = 64
"""The most tokens that a decode step reads beside its own: a pass costs as much as they do, but not its last layer."""


class EngineCore:
    """The synchronous engine: deterministic given its seed and the order of calls."""

    def __init__(self, spec: EngineSpec) -> None:
        config = decoder_config(spec)
        self.spec, self.config = spec, config
        self._device = find_device(spec.device)
        weights = {name: weight.to(self._device) for name, weight in read_weights(Path(spec.model_path)).items()}
        self._base = weights if spec.adapter_scale else None
        self._decoder = Decoder(config, weights, check_numerics(spec.numerics), spec.max_context, self._device)
        self._head = Head(self._decoder)
        self._cache = self._decoder.new_cache(spec.max_num_seqs)
        has_routing = spec.returns_routing and config.is_routed
        self._routing = RoutingCache(self._decoder.new_routing(spec.max_num_seqs) if has_routing else None, spec.max_context)
        self.decode_step = DecodeStep(self._decoder, self._cache, self._routing.table)
        self._generator = torch.Generator().manual_seed(spec.seed)
        self._table = SlotTable(spec.max_num_seqs, spec.max_context)
        self._placement = Placement(self._cache, self._routing)
        self._requests: dict[str, Request] = {}
        self._waiting: dict[str, Request] = {}
        self._decoding: dict[int, Request] = {}  # by slot
        self._version: PolicyVersion = 0
        self._paused: KVMode | None = None
        self._count = EngineStats()

    @property
    def idle(self) -> bool:
        """Whether `step` would do nothing: paused, or nothing that can decode or be admitted."""
        return self._paused is not None or not (self._decoding or any(map(self._can_admit, self._waiting.values())))

    @property
    def stats(self) -> EngineStats:
        """The counters."""
        return replace(self._count, version=self._version)

    def add(self, request_id: str, prompt_ids: Sequence[int], sampling: Sampling) -> None:
        """Queue a request; one that does not fit, or whose id is in use, is a `ConfigError`."""
        check_request(prompt_ids, self.config.vocab_size, self.spec.max_context)
        self.queue(Request.of(request_id, prompt_ids, sampling, self.spec.max_context))

    def queue(self, request: Request) -> None:
        """Queue a request that fits; one whose id is in use is a `ConfigError`."""
        if request.id in self._requests:
            raise ConfigError("a request id is in use", got=request.id, allowed="unique ids", fix="number the turns")
        self._requests[request.id] = request
        self._count.num_requests += 1
        if request.sampling.prompt_logprobs:  # a probe: the trainer waits for it
            self._waiting = {request.id: request, **self._waiting}
        else:
            self._waiting[request.id] = request

    def abort(self, request_id: str) -> Generation | None:
        """End a request: what it has sampled so far, or None if it has finished already."""
        request = self._requests.get(request_id)
        return None if request is None else self._end(request, "abort")

    def reset(self, seed: int) -> None:
        """Sample from here on as an engine that was made with this seed and has the present weights; it has no request."""
        assert not self._requests, "nobody waits for it"
        self._generator.manual_seed(seed)
        self._table = SlotTable(self.spec.max_num_seqs, self.spec.max_context)
        self._placement.reset()
        self._cache.zero_()

    def set_quota(self, request_id: str, num_tokens: int | None) -> None:
        """Hold a request in its slot once it has sampled so many tokens; None lifts the quota. A finished one is left alone."""
        request = self._requests.get(request_id)
        if request is None:
            return
        request.quota = num_tokens
        if request.slot >= 0:
            self._table.limit[request.slot] = request.limit
            self._table.sync([request])
            if request.id not in self._waiting:
                self._set_decoding([request], not request.is_held)

    def pause(self, mode: PauseMode, kv: KVMode) -> list[tuple[str, Generation]]:
        """Stop stepping; mode "abort" ends all requests and returns what they have sampled."""
        self._paused = kv
        requests = list(self._requests.values()) if mode == "abort" else []
        return [(request.id, self._end(request, "abort")) for request in requests]

    def partials(self) -> dict[str, Generation]:
        """What each request has sampled so far, with finish reason "abort"."""
        return self._told([(request, 0) for request in self._requests.values()])

    def grown(self, known: Mapping[str, int]) -> dict[str, Generation]:
        """What requests of trajectories have sampled after the first `known` tokens of each, by request id."""
        requests = ((request, known.get(trajectory_of(request.id))) for request in self._requests.values())
        return self._told([(request, start) for request, start in requests if start is not None])

    def _told(self, requests: Sequence[tuple[Request, int]]) -> dict[str, Generation]:
        self._table.sync([request for request, _ in requests if request.slot >= 0])
        return {request.id: self._generation(request, "abort", start) for request, start in requests}

    def _generation(self, request: Request, reason: FinishReason, start: int = 0) -> Generation:
        return request.generation(self._table.output_logprobs(request, start), reason, start, self._routing.by_mark(request))

    def update_weights(self, tensors: Mapping[str, Tensor], version: PolicyVersion) -> None:
        """Take over new weights, or adapters of the base; with kv = "recompute" all cached keys and values are dropped.

        Raises:
            ConfigError: The engine is not paused, or the version goes back.
            ModelFolderError: The weights do not fit the model; the old ones stay.
        """
        check_update(version, over=self._version, is_paused=self._paused is not None)
        if self._base is not None:
            adapters = {name: tensor.to(self._device) for name, tensor in tensors.items()}
            tensors = merge(self._base, adapters, self.spec.adapter_scale)
        self._decoder.load(tensors)
        self._version = version
        running = [request for request in self._requests.values() if request.slot >= 0]
        self._table.sync(running)
        for request in running:
            request.routing = self._routing.by_mark(request)
        if self._paused == "stale":
            self._placement.age()
            for request in running:
                if request.id not in self._waiting:
                    request.mark(version, "mixed")
            return
        self._set_decoding(running, False)
        for request in running:
            request.extend_keys()
        self._waiting = dict(self._requests)
        self._placement.clear()

    def resume(self) -> None:
        """Go on stepping."""
        self._paused = None

    def step(self) -> list[tuple[str, Generation]]:
        """Admit and prefill what waits, then decode one token of each running request; returns those that ended."""
        if self.idle:
            return []
        started = time.perf_counter()
        self._count.num_steps += 1
        with torch.inference_mode():
            before = self._count.num_prefill_tokens
            joined: Joined | None = None
            while wave := self._admit():
                joined = self._prefill(wave)
            num_read = self._count.num_prefill_tokens - before
            num_joined = len(joined[0]) if joined else 0
            if num_read > num_joined:
                wait_for(self._device)
            prefilled = time.perf_counter()
            num_rows = len(self._decoding)
            finished = self._decode(joined) if num_rows else []
        ended = time.perf_counter()
        joined_s = (ended - prefilled) * num_joined / max(1, num_rows + num_joined)  # of one pass, by tokens
        if num_read:
            self._count.prefill += piece(num_read, prefilled - started + joined_s)
        if num_rows:
            self._count.decode += piece(num_rows, ended - prefilled - joined_s)
        self._count.busy_s += ended - started
        return finished

    def _can_admit(self, request: Request) -> bool:
        return not request.is_held and self._placement.can_place(request)

    def _admit(self) -> list[tuple[Request, Match]]:
        """Give waiting requests their slots; returns each with what was found in the cache.

        Of requests that share the first block that no slot holds, only one is admitted: the others find it next time.
        """
        wave: list[tuple[Request, Match]] = []
        claimed: set[int] = set()
        still_waiting: dict[str, Request] = {}
        for request in self._waiting.values():
            if not self._can_admit(request):
                still_waiting[request.id] = request
                continue
            match = self._placement.find(request)
            first_missing = self._placement.first_missing(request, match)
            if not claimed.isdisjoint(first_missing):
                still_waiting[request.id] = request
                continue
            claimed.update(first_missing)
            self._placement.place(request, match, self._count.num_steps)
            self._count.num_prefix_hit_tokens += match.length
            wave.append((request, match))
        self._waiting = still_waiting
        return wave

    def _prefill(self, wave: list[tuple[Request, Match]]) -> Joined | None:
        """Compute the tokens that were not found, all but the newest, and start decoding.

        If nothing else can be admitted, the last few are left to the decode step, which reads them beside its own.
        """
        missing = [(len(request.tokens) - 1 - match.length, match.length, request) for request, match in wave]
        missing = sorted((entry for entry in missing if entry[0]), key=lambda entry: entry[0])
        joined = None
        is_last = not any(map(self._can_admit, self._waiting.values()))
        while missing:
            size = max(1, sum((i + 1) * entry[0] <= PREFILL_TOKENS for i, entry in enumerate(missing)))
            joined = self._prefill_batch(missing[:size], may_join=is_last and size == len(missing))
            missing = missing[size:]
        requests = [request for request, _ in wave]
        new = [request for request in requests if not request.marks]
        if new:
            self._table.place(new)
        for request, match in wave:
            if match.kv == "fresh":
                self._placement.share(request)
            request.mark(self._version, match.kv)
        self._set_decoding(requests, True)
        return joined

    def _prefill_batch(self, batch: list[tuple[int, int, Request]], *, may_join: bool) -> Joined | None:
        counts, starts, requests = zip(*batch, strict=True)
        attention = PrefillAttention([request.slot for request in requests], starts, counts, self._cache)
        tokens = [token for count, start, request in batch for token in request.tokens[start : start + count]]
        tokens_there = torch.tensor(tokens).to(self._device)
        asking = [request.sampling.prompt_logprobs and not request.marks for request in requests]
        routing = self._routing.table
        self._count.num_prefill_tokens += len(tokens)
        if may_join and len(tokens) <= JOINED_TOKENS and not any(asking) and not self.decode_step.has_few_shapes:
            return tokens_there, attention
        is_read = routing is not None or any(asking)
        hidden = self._decoder.forward(
            tokens_there, attention.positions, self._cache, attention, routing, only_cache=not is_read
        )
        for count, request, asks, rows in zip(counts, requests, asking, torch.split(hidden, list(counts)), strict=True):
            if asks:
                following = torch.tensor(request.tokens[1 : count + 1]).to(self._device)
                request.prompt_logprobs = tuple(self._head.logprobs(rows, following).tolist())
        return None

    def _decode(self, joined: Joined | None) -> list[tuple[str, Generation]]:
        """Sample one token for each decoding row; others that the step computes are ignored."""
        table, num_rows = self._table, max(self._decoding) + 1
        slots = self.decode_step.rows(table, num_rows)
        uniform = torch.rand(num_rows, generator=self._generator, dtype=torch.float64)
        sent = (uniform[slots], table.temperature[slots], table.top_p[slots], table.top_k[slots])
        uniform, temperature, top_p, top_k = (values.to(self._device, non_blocking=True) for values in sent)
        support = (top_p, top_k) if any(request.reshapes for request in self._decoding.values()) else None
        hidden = self.decode_step.hidden(table, slots, joined)
        tokens, logprobs = (drawn.cpu() for drawn in self._head.draw(hidden, uniform, temperature, support))
        position, active = table.position[slots], table.active[slots]
        at = table.row_start[slots] + position + 1
        table.tokens.view(-1)[at] = tokens
        table.logprobs.view(-1)[at] = logprobs
        position += active
        table.position[slots] = position
        self._count.num_decode_tokens += len(self._decoding)
        stopped = (table.stop_ids[slots] == tokens[:, None]).any(dim=1)
        done = (active & (stopped | (position >= table.limit[slots]))).nonzero().squeeze(1)
        if not len(done):
            return []
        requests = [self._decoding[slot] for slot in slots[done].tolist()]
        table.sync(requests)
        finished = []
        for request, is_stop in zip(requests, stopped[done].tolist(), strict=True):
            if is_stop or len(request.tokens) == request.end + 1:
                finished.append((request.id, self._end(request, "stop" if is_stop else "length")))
            else:
                self._set_decoding([request], False)
        return finished

    def _set_decoding(self, requests: Sequence[Request], decoding: bool) -> None:
        if not requests:
            return
        self._table.active[torch.tensor([request.slot for request in requests])] = decoding
        for request in requests:
            if decoding:
                self._decoding[request.slot] = request
            else:
                self._decoding.pop(request.slot, None)

    def _end(self, request: Request, reason: FinishReason) -> Generation:
        """Free the request's slot, which stays warm, and build its result."""
        del self._requests[request.id]
        was_waiting = self._waiting.pop(request.id, None) is not None
        if request.slot >= 0:
            if not was_waiting:
                self._table.sync([request])
            self._placement.leave(request, self._count.num_steps, is_computed=not was_waiting)
            self._set_decoding([request], False)
        return self._generation(request, reason)
