"""What agent programs ask for, and what becomes of it: counted, so that nothing is changed or dropped in silence."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(slots=True)
class GatewayCounts:
    """Counts since the last call of `take`.

    Args:
        requests: Requests for a turn that were answered, by how their conversation goes on: "opened" (a new one), "continued"
            (token by token), "forked" (from an earlier turn), "rewritten" (messages that the model had read have changed).
        encoded_anew: Tokens of rewritten conversations that were encoded from their text.
        dropped_answers: Answers that nobody waited for any more.
        dropped_tokens: Tokens that were sampled for them, and are not trained.
        unknown_tokens: Tokens of prompts that stand for words which the tokenizer does not know.
        overridden: Wishes that training does not honour, by parameter.
        is_warned: Whether unknown words were warned of.
        refused: Requests that were refused, by the code of the refusal.
    """

    requests: Counter[str] = field(default_factory=Counter)
    encoded_anew: int = 0
    dropped_answers: int = 0
    dropped_tokens: int = 0
    unknown_tokens: int = 0
    overridden: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    is_warned: bool = False

    def take(self) -> dict[str, float]:
        """Return the counts as metrics, and begin again."""
        found = {f"gateway/{kind}": float(self.requests[kind]) for kind in ("opened", "continued", "forked", "rewritten")}
        found |= {
            "gateway/encoded_anew_tokens": float(self.encoded_anew),
            "gateway/dropped_answers": float(self.dropped_answers),
            "gateway/dropped_tokens": float(self.dropped_tokens),
            "gateway/unknown_tokens": float(self.unknown_tokens),
            "gateway/overridden": float(self.overridden.total()),
            "gateway/refused": float(self.refused.total()),
        }
        is_warned = self.is_warned
        self.__init__()  # type: ignore[misc]
        self.is_warned = is_warned
        return found
