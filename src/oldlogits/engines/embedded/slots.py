"""The requests of the embedded engine, and the tensors that hold what it has sampled, one row per slot."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from oldlogits.core.engine import FinishReason, Generation, Sampling, Span
from oldlogits.core.errors import ConfigError
from oldlogits.core.trajectory import KV
from oldlogits.core.weights import PolicyVersion
from oldlogits.engines.embedded.decoder import TILE
from oldlogits.engines.embedded.prefix import chain_keys


def check_request(prompt_ids: Sequence[int], vocab_size: int, max_context: int) -> None:
    """Refuse a prompt that is empty, fills the context, or has tokens outside the vocabulary."""
    if not 0 < len(prompt_ids) < max_context:
        raise ConfigError(
            "the prompt does not fit the engine's context",
            got=f"{len(prompt_ids)} tokens",
            allowed=f"1 to {max_context - 1} tokens, of {max_context} with one to sample",
            fix="shorten the prompt, or raise env.max_episode_tokens (`oldlogits serve`: --max-context)",
        )
    if min(prompt_ids) < 0 or max(prompt_ids) >= vocab_size:
        raise ConfigError(
            "the prompt has tokens outside the vocabulary",
            got=f"token ids from {min(prompt_ids)} to {max(prompt_ids)}",
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

    def generation(self, logprobs: Iterable[float], reason: FinishReason, first: int = 0) -> Generation:
        """The result from an output token on, of the tokens as of the last `sync`."""
        ends = [start for start, _, _ in self.marks[1:]] + [self.num_sampled]
        spans = [
            Span(version=version, start=max(start, first) - first, end=end - first, kv=kv)
            for (start, version, kv), end in zip(self.marks, ends, strict=False)
            if end > max(start, first)
        ]
        return Generation(
            output_ids=tuple(self.tokens[self.num_prompt + first :]),
            logprobs=tuple(logprobs),
            spans=tuple(spans),
            finish_reason=reason,
            prompt_logprobs=self.prompt_logprobs,
        )


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
