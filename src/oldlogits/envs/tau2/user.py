"""The customer of an episode: one that follows a script, or a language model that plays the scenario."""

from __future__ import annotations

import re
from collections.abc import Awaitable
from typing import Final, Protocol, cast

from oldlogits.core.environment import Row

GREETING: Final = "Hi! How can I help you today?"
"""What the agent is taken to have said first."""

_STOPS: Final = ("###STOP###", "###TRANSFER###", "###OUT-OF-SCOPE###")
"""What a customer writes at the end of the conversation."""
_GO_AHEAD: Final = "Yes, please go ahead. If everything is done, just say so."
_AS_OBJECT: Final = re.compile(
    r"(?i)\b(tells?|told|gives?|given|asks?|asked|offers?|offered|lets?|helps?|allows?|sends?|shows?|informs?|charges?|transfers?"
    r"|refunds?|wants?|to|for|with|from|of|about) you\b"
)
_PERSONS: Final = (("[Yy]ou are", "I am"), ("[Yy]ou're", "I'm"), ("Your", "My"), ("your", "my"), ("You", "I"), ("you", "I"))


class User(Protocol):
    """Somebody who talks with the agent."""

    def reply(self, message: str) -> str | Awaitable[str | None] | None:
        """Return the answer to what the agent said, or None at the end; the first message is a greeting."""


class ScriptedUser:
    """A customer without a language model: says the request, then all else that the scenario tells, and then agrees.

    The conversation ends with the agent's second message in a row without a call of a tool between them.
    """

    def __init__(self, task: Row) -> None:
        self._says = iter([_first_person(text) for text in _parts(task)])
        self._calls = self._heard = 0

    def called(self, name: str) -> None:
        """Take note of a call of a tool that the agent made."""
        self._calls += 1

    def reply(self, message: str) -> str | None:
        """Answer a message of the agent."""
        if (said := next(self._says, None)) is None:
            said = _GO_AHEAD if self._calls > self._heard else None
        self._heard = self._calls
        return said


def scenario_of(task: Row) -> str:
    """Return the scenario of a task, the instructions of whoever plays its customer."""
    scenario = cast(Row, task["user_scenario"])
    persona, instructions = scenario.get("persona"), scenario.get("instructions", task.get("instructions"))
    if isinstance(instructions, dict):
        instructions = "\n\n".join(f"{key.replace('_', ' ')}: {text}" for key, text in instructions.items() if text)
    return f"{instructions}\n\npersona: {persona}" if persona else str(instructions)


def is_the_end(said: str) -> bool:
    """Return whether a customer that is a language model ends the conversation."""
    return any(stop in said for stop in _STOPS)


def _parts(task: Row) -> list[str]:
    scenario = cast(Row, task["user_scenario"])
    instructions = scenario.get("instructions", task.get("instructions"))
    if not isinstance(instructions, dict):
        return [str(instructions)]
    first = "\n".join(str(instructions[key]) for key in ("reason_for_call", "known_info") if instructions.get(key))
    return [part for part in (first, str(instructions.get("task_instructions") or "")) if part]


def _first_person(text: str) -> str:
    """Return what a customer was told, as the customer says it."""
    text = _AS_OBJECT.sub(r"\1 me", text)
    for told, said in _PERSONS:
        text = re.sub(rf"\b{told}\b", said, text)
    return text.replace("I were", "I was")
