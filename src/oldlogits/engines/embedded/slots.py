"""The requests of the embedded engine, and the tensors that hold what it has sampled, one row per slot."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import torch
from torch import Tensor

from oldlogits.core.engine import FinishReason, Generation, Sampling, Span
from oldlogits.core.errors import ConfigError
from oldlogits.core.trajectory import KV, Choices, Routing
from oldlogits.core.weights import PolicyVersion
from oldlogits.engines.embedded.attention import TILE
from oldlogits.engines.embedded.prefix import chain_keys


def check_request(prompt_ids: Sequence[int], vocab_size: int, max_context: int, num_checked: int = 0) -> None:
    """Refuse a prompt that is empty, fills the context, or has tokens outside the vocabulary after the first `num_checked`."""
    if not 0 < len(prompt_ids) < max_context:
        raise ConfigError(
            "the prompt does not fit the engine's context",
            got=f"{len(prompt_ids)} tokens",
            allowed=f"1 to {max_context - 1} tokens, of {max_context} with one to sample",
            fix="shorten the prompt, or raise env.max_episode_tokens (`oldlogits serve`: --max-context)",
        )
    new = prompt_ids[num_checked:]
    if new and (min(new) < 0 or max(new) >= vocab_size):
        raise ConfigError(
            "the prompt has tokens outside the vocabulary",
            got=f"token ids from {min(new)} to {max(new)}",
            allowed=f"0 to {vocab_size - 1}",
            fix="use the tokenizer that belongs to the model",
        )


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """One request on its way through the engine.

    Args:
        tokens: The prompt, then the outputs as of the last `sync`.
        end: The index at which its last token can be.
        keys: Chained block keys of the tokens but the last.
        slot: Its row; -1 before it has one.
        quota: It stops after so many output tokens until the quota is raised.
        marks: From which output token on which version sampled, and whether keys and values were fresh.
        prompt_logprobs: The log-probs of the prompt, if they are asked for and computed.
        routing: By mark, as far as newer weights followed: the experts of its tokens but the last, where they are recorded.
    """

    id: str
    sampling: Sampling
    tokens: list[int]
    num_prompt: int
    end: int
    keys: list[int]
    slot: int = -1
    quota: int | None = None
    marks: list[tuple[int, PolicyVersion, KV]] = field(default_factory=list)
    prompt_logprobs: tuple[float, ...] = ()
    routing: list[Choices] = field(default_factory=list)

    @classmethod
    def of(
        cls, id: str, prompt_ids: Sequence[int], sampling: Sampling, max_context: int, known_keys: Sequence[int] = ()
    ) -> Self:
        """Make a request that has not sampled yet; `known_keys` are those of the first blocks of its prompt."""
        tokens = list(prompt_ids)
        end = min(len(tokens) + sampling.max_tokens, max_context) - 1
        keys = chain_keys(tokens[:-1], known_keys)
        return cls(id=id, sampling=sampling, tokens=tokens, num_prompt=len(tokens), end=end, keys=keys)

    @property
    def num_sampled(self) -> int:
        """Output tokens as of the last `sync`."""
        return len(self.tokens) - self.num_prompt

    @property
    def is_held(self) -> bool:
        """Whether the quota is used up, as of the last `sync`."""
        return self.quota is not None and self.num_sampled >= self.quota

    @property
    def limit(self) -> int:
        """The index of the token after which it ends or is held."""
        return self.end if self.quota is None else min(self.end, self.num_prompt - 1 + self.quota)

    @property
    def reshapes(self) -> bool:
        """Whether it restricts the support."""
        return self.sampling.top_p < 1 or self.sampling.top_k > 0

    @property
    def kv(self) -> KV:
        """Whether its keys and values, once it has some, are all of the current version."""
        return self.marks[-1][2]

    def mark(self, version: PolicyVersion, kv: KV) -> None:
        """Output tokens from here on are sampled with this version."""
        if not self.marks or self.marks[-1][1:] != (version, kv):
            self.marks.append((self.num_sampled, version, kv))

    def extend_keys(self) -> None:
        """Bring the block keys up to date with the tokens."""
        self.keys = chain_keys(self.tokens[:-1], self.keys)

    def generation(
        self, logprobs: Iterable[float], reason: FinishReason, first: int = 0, routing: Sequence[Choices] = ()
    ) -> Generation:
        """The result from an output token on, of the tokens as of the last `sync`, with the routing of each mark, if any."""
        ends = [start for start, _, _ in self.marks[1:]] + [self.num_sampled]
        known: Sequence[Choices | None] = routing or [None] * len(ends)
        spans = [
            Span(
                version=version,
                start=max(start, first) - first,
                end=end - first,
                kv=kv,
                routing=self._routing_of(choices, start, end, first) if choices is not None else None,
            )
            for (start, version, kv), end, choices in zip(self.marks, ends, known, strict=False)
            if end > max(start, first)
        ]
        return Generation(
            output_ids=tuple(self.tokens[self.num_prompt + first :]),
            logprobs=tuple(logprobs),
            spans=tuple(spans),
            finish_reason=reason,
            prompt_logprobs=self.prompt_logprobs,
        )

    def _routing_of(self, choices: Choices, start: int, end: int, first: int) -> Routing:
        """The experts of the tokens before the last of a span, from those on that a caller who knows `first` tokens lacks."""
        begin = self.num_prompt + first - 1 if start < first else 0
        return Routing.of(choices[begin : self.num_prompt + end - 1])


class RoutingCache:
    """The experts that served the tokens of each slot, beside their keys and values; nothing where `table` is not there."""

    def __init__(self, table: Tensor | None, max_context: int) -> None:
        self.table, self._width = table, max_context

    def copy(self, source: int, target: int, length: int) -> None:
        """Let a slot begin with the entries of another."""
        if self.table is not None:
            begin, there = source * self._width, target * self._width
            self.table[there : there + length] = self.table[begin : begin + length]

    def by_mark(self, request: Request) -> list[Choices]:
        """The experts of a request's tokens but the last, as they were when the tokens of each mark were sampled."""
        if self.table is None or len(request.routing) == len(request.marks):
            return request.routing
        begin = request.slot * self._width
        now = self.table[begin : begin + len(request.tokens) - 1].cpu().numpy().copy()
        return [*request.routing, now if now.itemsize == 1 else now.view(np.uint16)]


class SlotTable:
    """What each slot's row needs in a decode step, as tensors; rows are padded to whole tiles."""

    def __init__(self, max_num_seqs: int, max_context: int) -> None:
        rows = -(-max_num_seqs // TILE) * TILE
        self._width = max_context + 1  # a row that is not active may write one token past its last
        self.tokens = torch.zeros(rows, self._width, dtype=torch.int64)
        self.logprobs = torch.zeros(rows, self._width)
        self.position = torch.zeros(rows, dtype=torch.int64)  # of the newest token
        self.limit = torch.zeros(rows, dtype=torch.int64)
        self.active = torch.zeros(rows, dtype=torch.bool)
        self.temperature = torch.ones(rows)
        self.top_p = torch.ones(rows)
        self.top_k = torch.zeros(rows, dtype=torch.int64)
        self.stop_ids = torch.full((rows, 1), -1)
        self.row_start = torch.arange(rows) * self._width

    def place(self, requests: Sequence[Request]) -> None:
        """Write new requests to their rows."""
        width = max(len(request.sampling.stop_token_ids) for request in requests)
        if width > self.stop_ids.shape[1]:
            missing = torch.full((len(self.stop_ids), width - self.stop_ids.shape[1]), -1)
            self.stop_ids = torch.cat((self.stop_ids, missing), dim=1)
        width = self.stop_ids.shape[1]
        slots = torch.tensor([request.slot for request in requests])
        samplings = [request.sampling for request in requests]
        self.position[slots] = torch.tensor([len(request.tokens) - 1 for request in requests])
        self.limit[slots] = torch.tensor([request.limit for request in requests])
        self.temperature[slots] = torch.tensor([sampling.temperature for sampling in samplings])
        self.top_p[slots] = torch.tensor([sampling.top_p for sampling in samplings])
        self.top_k[slots] = torch.tensor([sampling.top_k for sampling in samplings])
        stops = [(*sampling.stop_token_ids, *[-1] * (width - len(sampling.stop_token_ids))) for sampling in samplings]
        self.stop_ids[slots] = torch.tensor(stops)
        for request in requests:
            self.tokens[request.slot, : len(request.tokens)] = torch.tensor(request.tokens)

    def sync(self, requests: Sequence[Request]) -> None:
        """Bring the requests' own token lists up to date."""
        positions = self.position.tolist()
        for request in requests:
            start, end = len(request.tokens), positions[request.slot] + 1
            if end > start:
                request.tokens += self.tokens[request.slot, start:end].tolist()

    def output_logprobs(self, request: Request, first: int = 0) -> list[float]:
        """Return the log-probs of a request's output tokens from one on, as of the last `sync`."""
        if request.slot < 0:
            return []
        logprobs: list[float] = self.logprobs[request.slot, request.num_prompt + first : len(request.tokens)].tolist()
        return logprobs
