"""A request to servers on its way: what its attempts have sampled so far, and when it is over."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from oldlogits.core.engine import FinishReason, Generation, Sampling, Span
from oldlogits.core.server import GenerateRequest, ServerProtocol
from oldlogits.engines.http.replica import Attempt


@dataclass(slots=True, kw_only=True, eq=False)
class PendingRequest:
    """A request, and what was kept of its attempts."""

    id: str
    prompt_ids: list[int]
    sampling: Sampling
    numbers: Iterator[int] = field(default_factory=itertools.count)
    output_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    prompt_logprobs: tuple[float, ...] = ()
    attempt: Attempt | None = None
    is_aborted: bool = False

    def keep(self, answer: Generation) -> None:
        """Add what an attempt sampled; it goes on a span of the same version."""
        offset = len(self.output_ids)
        self.output_ids += answer.output_ids
        self.logprobs += answer.logprobs
        self.prompt_logprobs = self.prompt_logprobs or answer.prompt_logprobs
        for span in answer.spans:
            span = replace(span, start=offset + span.start, end=offset + span.end)
            if self.spans and self.spans[-1].version == span.version:
                self.spans[-1] = replace(self.spans[-1], end=span.end)
            else:
                self.spans.append(span)

    def ended_by(self, reason: FinishReason, max_context: int) -> FinishReason | None:
        """Why it is over, given how its last attempt ended; None: it is not."""
        if reason != "abort" or self.is_aborted:
            return reason
        if self.output_ids and self.output_ids[-1] in self.sampling.stop_token_ids:
            return "stop"
        used = len(self.prompt_ids) + len(self.output_ids)
        return "length" if len(self.output_ids) >= self.sampling.max_tokens or used >= max_context else None

    def generation(self, reason: FinishReason) -> Generation:
        """What it has sampled."""
        return Generation(
            output_ids=tuple(self.output_ids),
            logprobs=tuple(self.logprobs),
            spans=tuple(self.spans),
            finish_reason=reason,
            prompt_logprobs=self.prompt_logprobs,
        )


async def unless_cut(server: ServerProtocol, asked: GenerateRequest, attempt: Attempt) -> Generation | None:
    """The server's answer; None if the attempt was cut before. Leaving closes the connection, which ends it there too."""
    answering = asyncio.ensure_future(server.generate(asked))
    cutting = asyncio.ensure_future(attempt.cut.wait())
    try:
        await asyncio.wait({answering, cutting}, return_when=asyncio.FIRST_COMPLETED)
        return await answering if answering.done() else None
    finally:
        cutting.cancel()
        if not answering.done():
            answering.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await answering
