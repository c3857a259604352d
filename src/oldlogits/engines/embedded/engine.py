"""The embedded engine: continuous batching over a static cache, one version per token, no dependency but torch.

One step of `EngineCore`, who feeds whom:

    add -> waiting --admit--> slots --prefill--> rows --decode--> finished -> Generation
             ^                  |   copy of what another slot holds: prefix index
             '-- update_weights with kv = "recompute" sends every running request back here, with its slot

Prefill computes keys and values of all tokens but the newest; the newest is the input of the decode step, the one
place where tokens are sampled. Prefill and the first decode step of a request are one step of the engine.

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
from oldlogits.engines.embedded.decoder import TILE, DecodeAttention, Decoder, PrefillAttention
from oldlogits.engines.embedded.model_folder import decoder_config, read_weights
from oldlogits.engines.embedded.numerics import check_numerics
from oldlogits.engines.embedded.prefix import BLOCK, NO_MATCH, Match, OwnSlots, PrefixIndex, chain_keys
from oldlogits.engines.embedded.sampling import draw_tokens, restrict_support
from oldlogits.engines.embedded.slots import Request, SlotTable, check_request
from oldlogits.models.adapters import merge

PREFILL_TOKENS: Final = 4096
"""The most tokens, padding included, of one prefill pass; a longer sequence goes alone."""

WARM_STEPS: Final = 64
"""A slot freed less than so many steps ago is taken last: its agent's next turn is expected to find it warm."""


class EngineCore:
    """The synchronous engine: deterministic given its seed and the order of calls."""

    def __init__(self, spec: EngineSpec) -> None:
        config = decoder_config(spec)
        self.spec, self.config = spec, config
        weights = read_weights(Path(spec.model_path))
        self._base = weights if spec.adapter_scale else None
        self._decoder = Decoder(config, weights, check_numerics(spec.numerics), spec.max_context)
        self._cache = self._decoder.new_cache(spec.max_num_seqs)
        self._generator = torch.Generator().manual_seed(spec.seed)
        self._table = SlotTable(spec.max_num_seqs, spec.max_context)
        self._index, self._own = PrefixIndex(spec.max_num_seqs), OwnSlots()
        self._freed_at = dict.fromkeys(range(spec.max_num_seqs), -WARM_STEPS)  # of the free slots: the step
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
        if request_id in self._requests:
            raise ConfigError("a request id is in use", got=request_id, allowed="unique ids", fix="number the turns")
        tokens = list(prompt_ids)
        request = Request(
            id=request_id,
            sampling=sampling,
            tokens=tokens,
            num_prompt=len(tokens),
            end=min(len(tokens) + sampling.max_tokens, self.spec.max_context) - 1,
            keys=chain_keys(tokens[:-1]),
        )
        self._requests[request_id] = request
        self._count.num_requests += 1
        if sampling.prompt_logprobs:  # a probe: the trainer waits for it
            self._waiting = {request_id: request, **self._waiting}
        else:
            self._waiting[request_id] = request

    def abort(self, request_id: str) -> Generation | None:
        """End a request: what it has sampled so far, or None if it has finished already."""
        request = self._requests.get(request_id)
        return None if request is None else self._end(request, "abort")

    def reset(self, seed: int) -> None:
        """Sample from here on as an engine that was made with this seed and has the present weights; it has no request."""
        assert not self._requests, "nobody waits for it"
        num, context = self.spec.max_num_seqs, self.spec.max_context
        self._generator.manual_seed(seed)
        self._table, self._index, self._own = SlotTable(num, context), PrefixIndex(num), OwnSlots()
        self._freed_at = dict.fromkeys(range(num), self._count.num_steps - WARM_STEPS)
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
        logprobs = self._table.output_logprobs
        return {request.id: request.generation(logprobs(request, start), "abort", start) for request, start in requests}

    def update_weights(self, tensors: Mapping[str, Tensor], version: PolicyVersion) -> None:
        """Take over new weights, or adapters of the base; with kv = "recompute" all cached keys and values are dropped.

        Raises:
            ConfigError: The engine is not paused, or the version goes back.
            ModelFolderError: The weights do not fit the model; the old ones stay.
        """
        check_update(version, over=self._version, is_paused=self._paused is not None)
        self._decoder.load(tensors if self._base is None else merge(self._base, tensors, self.spec.adapter_scale))
        self._version = version
        running = [request for request in self._requests.values() if request.slot >= 0]
        self._table.sync(running)
        self._index.clear()
        if self._paused == "stale":
            self._own.age()
            for request in running:
                if request.id not in self._waiting:
                    request.mark(version, "mixed")
            return
        self._set_decoding(running, False)
        for request in running:
            request.extend_keys()
        self._waiting = dict(self._requests)
        self._own.clear()
        self._cache.zero_()  # no old entry, finite or not, reaches a new sequence

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
            is_prefill = False
            while wave := self._admit():
                is_prefill = True
                self._prefill(wave)
            prefilled = time.perf_counter()
            if is_prefill:
                self._count.prefill += piece(self._count.num_prefill_tokens - before, prefilled - started)
            num_rows = len(self._decoding)
            finished = self._decode() if num_rows else []
        ended = time.perf_counter()
        if num_rows:
            self._count.decode += piece(num_rows, ended - prefilled)
        self._count.busy_s += ended - started
        return finished

    def _can_admit(self, request: Request) -> bool:
        return not request.is_held and (request.slot >= 0 or bool(self._freed_at))

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
            match = self._find(request)
            first_missing = request.keys[match.length // BLOCK : match.length // BLOCK + 1] if match.kv == "fresh" else []
            if not claimed.isdisjoint(first_missing):
                still_waiting[request.id] = request
                continue
            claimed.update(first_missing)
            self._take_slot(request, match)
            wave.append((request, match))
        self._waiting = still_waiting
        return wave

    def _find(self, request: Request) -> Match:
        """What the cache holds of a request: its trajectory's own older entries, else what requests share."""
        if request.sampling.prompt_logprobs:
            return NO_MATCH
        known = request.tokens[:-1]
        own = self._own.match(trajectory_of(request.id), known)
        return own if own.length else self._index.match(known, request.keys)

    def _take_slot(self, request: Request, match: Match) -> None:
        """Choose the request's slot, if it has none, and copy what was found to it."""
        if request.slot < 0:
            request.slot = self._choose_slot(match)
            del self._freed_at[request.slot]
        slot, length = request.slot, match.length
        if length and slot != match.slot:
            self._cache[:, :, slot, :, :length] = self._cache[:, :, match.slot, :, :length]
        self._own.take(slot)
        self._index.hold(slot, request.tokens[:length] if match.kv == "fresh" else [], request.keys)
        self._count.num_prefix_hit_tokens += length

    def _choose_slot(self, match: Match) -> int:
        """The slot of the match if it is free and holds nothing else; else the lowest slot that has cooled down."""
        if match.kv == "mixed" or (match.slot in self._freed_at and self._index.length(match.slot) == match.length):
            return match.slot
        cool = [slot for slot, freed_at in self._freed_at.items() if self._count.num_steps - freed_at >= WARM_STEPS]
        return min(cool) if cool else min(self._freed_at, key=lambda slot: (self._freed_at[slot], slot))

    def _prefill(self, wave: list[tuple[Request, Match]]) -> None:
        """Compute the tokens that were not found, all but the newest, and start decoding."""
        missing = [(len(request.tokens) - 1 - match.length, match.length, request) for request, match in wave]
        missing = sorted((entry for entry in missing if entry[0]), key=lambda entry: entry[0])
        while missing:
            size = max(1, sum((i + 1) * entry[0] <= PREFILL_TOKENS for i, entry in enumerate(missing)))
            self._prefill_batch(missing[:size])
            missing = missing[size:]
        requests = [request for request, _ in wave]
        new = [request for request in requests if not request.marks]
        if new:
            self._table.place(new)
        for request, match in wave:
            if match.kv == "fresh":
                self._index.hold(request.slot, request.tokens[:-1], request.keys)
            request.mark(self._version, match.kv)
        self._set_decoding(requests, True)

    def _prefill_batch(self, batch: list[tuple[int, int, Request]]) -> None:
        counts, starts, requests = zip(*batch, strict=True)
        attention = PrefillAttention([request.slot for request in requests], starts, counts, self._cache)
        tokens = [token for count, start, request in batch for token in request.tokens[start : start + count]]
        hidden = self._decoder.forward(torch.tensor(tokens), attention.positions, self._cache, attention)
        self._count.num_prefill_tokens += len(tokens)
        for (count, _, request), rows in zip(batch, torch.split(hidden, list(counts)), strict=True):
            if request.sampling.prompt_logprobs and not request.marks:
                logp = torch.log_softmax(self._decoder.logits(rows), dim=-1)
                following = torch.tensor(request.tokens[1 : count + 1])
                request.prompt_logprobs = tuple(logp.gather(1, following[:, None]).squeeze(1).tolist())

    def _decode(self) -> list[tuple[str, Generation]]:
        """Sample one token for each decoding row; rows in between are computed and ignored."""
        table, num_rows = self._table, max(self._decoding) + 1
        seen = torch.where(table.active, table.position + 1, 0)
        crops = seen.view(-1, TILE).amax(dim=1)[: -(-num_rows // TILE)].tolist()
        position, active = table.position[:num_rows], table.active[:num_rows]
        at = table.row_start[:num_rows] + position
        attention = DecodeAttention(position, crops, self._cache)
        logits = self._decoder.logits(self._decoder.forward(table.tokens.view(-1)[at], position, self._cache, attention))
        temperature = table.temperature[:num_rows]
        if any(request.reshapes for request in self._decoding.values()):
            logits = restrict_support(logits, temperature, table.top_p[:num_rows], table.top_k[:num_rows])
        uniform = torch.rand(num_rows, generator=self._generator, dtype=torch.float64)
        tokens, logprobs = draw_tokens(logits, temperature, uniform)
        at += 1
        table.tokens.view(-1)[at] = tokens
        table.logprobs.view(-1)[at] = logprobs
        position += active
        self._count.num_decode_tokens += len(self._decoding)
        stopped = (table.stop_ids[:num_rows] == tokens[:, None]).any(dim=1)
        done = (active & (stopped | (position >= table.limit[:num_rows]))).nonzero().squeeze(1)
        if not len(done):
            return []
        requests = [self._decoding[slot] for slot in done.tolist()]
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
        if request.slot >= 0 and not was_waiting:
            self._table.sync([request])
            if request.kv == "fresh":
                request.extend_keys()
                self._index.hold(request.slot, request.tokens[:-1], request.keys)
            if trajectory := trajectory_of(request.id):
                self._own.leave(request.slot, trajectory, request.tokens[:-1], request.kv)
        if request.slot >= 0:
            self._set_decoding([request], False)
            self._freed_at[request.slot] = self._count.num_steps
        return request.generation(self._table.output_logprobs(request), reason)
