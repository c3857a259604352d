"""An assistant turn as clients read it, from the text that was sampled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from oldlogits.core.environment import JsonValue
from oldlogits.core.parser import Parser, ToolCall
from oldlogits.engines.chat_api.messages import Call, Turn, new_id
from oldlogits.envs.text import readable, spoken

_OPEN, _CLOSE = "<think>", "</think>"


def read_turn(text: str, parser: Parser, tools: Sequence[Mapping[str, JsonValue]], *, is_whole: bool = True) -> Turn:
    """Read a turn: its calls, and what it says aloud beside them.

    A turn that holds something which is no call of one of the tools is a message: clients read it as it is.

    Args:
        text: What was sampled, without its end-of-turn token.
        parser: Reads the calls.
        tools: Those of the request.
        is_whole: Whether the turn came to its end; a turn that was cut off calls nothing.
    """
    aloud = readable(spoken(text))
    thoughts = readable(_thoughts(text))
    parameters = {name: _parameters(tool) for tool in tools for name in (_name(tool),)}
    found = parser.parse(aloud) if tools and is_whole else ()
    calls = [_call(call, parameters) for call in found if isinstance(call, ToolCall)]
    if not calls or len(calls) < len(found) or None in calls:
        return Turn(content=aloud, thoughts=thoughts, calls=())
    return Turn(content="", thoughts=thoughts, calls=tuple(call for call in calls if call is not None))


def _call(call: ToolCall, tools: Mapping[str, Mapping[str, JsonValue]]) -> Call | None:
    """The call with all of its arguments by name; None: no tool takes it."""
    parameters = tools.get(call.name)
    if parameters is None or len(call.positional) > len(parameters):
        return None
    by_position = {
        name: _typed(word, schema) for word, (name, schema) in zip(call.positional, parameters.items(), strict=False)
    }
    return Call(id=new_id("call"), name=call.name, arguments={**by_position, **call.named})


def _typed(word: str, schema: JsonValue) -> JsonValue:
    """A word of a positional call as the type that its schema names."""
    kind = schema.get("type") if isinstance(schema, dict) else None
    try:
        return int(word) if kind == "integer" else float(word) if kind == "number" else word
    except ValueError:
        return word


def _name(tool: Mapping[str, JsonValue]) -> str:
    return str(cast("Mapping[str, JsonValue]", tool["function"])["name"])


def _parameters(tool: Mapping[str, JsonValue]) -> Mapping[str, JsonValue]:
    schema = cast("Mapping[str, JsonValue]", tool["function"]).get("parameters")
    found = schema.get("properties") if isinstance(schema, dict) else None
    return found if isinstance(found, dict) else {}


def _thoughts(text: str) -> str:
    """What a turn thinks: the text before the end of its thoughts, whose beginning may stand in the prompt."""
    thought, closed, _ = text.rpartition(_CLOSE)
    if not closed:
        return text.partition(_OPEN)[2]
    return thought.partition(_OPEN)[2] if _OPEN in thought else thought
