"""A request to servers on its way: what its attempts have sampled so far, and when it is over."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from array import array
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, field, replace
from typing import Final

from oldlogits.core.engine import FinishReason, Generation, Sampling
from oldlogits.engines.http.replica import Attempt

NOTHING: Final = Generation(output_ids=(), logprobs=(), spans=(), finish_reason="abort")


@dataclass(slots=True, kw_only=True, eq=False)
class PendingRequest:
    """A request, and what was kept of its attempts."""

    id: str
    prompt_ids: array[int]
    sampling: Sampling
    numbers: Iterator[int] = field(default_factory=itertools.count)
    kept: Generation = NOTHING
    attempt: Attempt | None = None
    is_aborted: bool = False

    def keep(self, answer: Generation) -> None:
        """Add what an attempt sampled; it goes on a span of the same version."""
        kept, offset = self.kept, len(self.kept.output_ids)
        spans = list(kept.spans)
        for span in answer.spans:
            if spans and spans[-1].version == span.version:
                before, new = spans[-1].routing, span.routing
                routing = before + new.last(span.end - span.start) if before is not None and new is not None else None
                spans[-1] = replace(spans[-1], end=offset + span.end, routing=routing)
            else:
                spans.append(replace(span, start=offset + span.start, end=offset + span.end))
        self.kept = Generation(
            output_ids=kept.output_ids + answer.output_ids,
            logprobs=kept.logprobs + answer.logprobs,
            spans=tuple(spans),
            finish_reason=answer.finish_reason,
            prompt_logprobs=kept.prompt_logprobs or answer.prompt_logprobs,
        )

    def ended_by(self, reason: FinishReason, max_context: int) -> FinishReason | None:
        """Why it is over, given how its last attempt ended; None: it is not."""
        if reason != "abort" or self.is_aborted:
            return reason
        if self.kept.output_ids and self.kept.output_ids[-1] in self.sampling.stop_token_ids:
            return "stop"
        used = len(self.prompt_ids) + len(self.kept.output_ids)
        return "length" if len(self.kept.output_ids) >= self.sampling.max_tokens or used >= max_context else None


async def unless(ended: Coroutine[None, None, object], answer: Coroutine[None, None, Generation]) -> Generation | None:
    """The answer; None if `ended` returns first, which cancels the answer."""
    answering, ending = asyncio.ensure_future(answer), asyncio.ensure_future(ended)
    try:
        await asyncio.wait({answering, ending}, return_when=asyncio.FIRST_COMPLETED)
        return await answering if answering.done() else None
    finally:
        ending.cancel()
        if not answering.done():
            answering.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await answering
