"""Who can act as the agent in ``oldlogits play``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from oldlogits.core.parser import Malformed, ToolCall

Role = Literal["user", "tool"]
Player = Callable[[Role, str], tuple[str, Sequence[ToolCall | Malformed]]]
"""An agent for one episode: it is given what the agent reads, and returns what it writes with the calls in that."""


class EndedEarlyError(Exception):
    """An agent may write no more; `reason` is the stop reason of the trajectory, `text` what the agent wrote last."""

    def __init__(self, reason: str, text: str = "") -> None:
        super().__init__(reason)
        self.reason, self.text = reason, text
