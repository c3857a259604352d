"""What environment code raises: the end of its episode, or an answer to the agent."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import cache
from typing import cast

from oldlogits.envs.base import ToolErrors, answered_errors
from oldlogits.envs.given import CALL_TOOL
from oldlogits.envs.text import readable
from oldlogits.envs.tools import tool_names

Errors = tuple[type[Exception], ...]


class EnvironmentFailed(Exception):  # noqa: N818 - an outcome of an episode, not an error of this package
    """Environment code raised or timed out; the text says what and where."""


class EnvironmentLost(EnvironmentFailed):
    """An environment ended through no fault of its own: its episode begins again."""


@dataclass(frozen=True, slots=True)
class Raised:
    """An exception that is an answer: what the agent reads of it."""

    text: str


@cache
def errors_of(environment_class: type, method: str, mode: ToolErrors) -> Errors:
    """Return the exceptions of a method that are answers, by `env.tool_errors`; a `reply` without a body answers nothing."""
    if method == "reply":
        return (NotImplementedError,)
    is_tool = method == CALL_TOOL or method in tool_names(environment_class)
    return answered_errors(environment_class, mode) if is_tool else ()


def answering(call: Callable[[], object], errors: Errors) -> Callable[[], object]:
    """Return the same call, which returns `Raised` where it would raise one of these exceptions."""

    def attempt() -> object:
        try:
            result = call()
        except EnvironmentFailed:  # it ran elsewhere, where its exceptions were told apart
            raise
        except errors as error:
            return _raised(error)
        return finish(cast("Awaitable[object]", result)) if inspect.isawaitable(result) else result

    async def finish(result: Awaitable[object]) -> object:
        try:
            return await result
        except EnvironmentFailed:
            raise
        except errors as error:
            return _raised(error)

    return attempt


def _raised(error: Exception) -> Raised:
    return Raised(f"error : {readable(str(error)).strip() or type(error).__name__}")
