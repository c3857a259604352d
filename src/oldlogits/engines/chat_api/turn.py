"""An assistant turn as clients read it, from the text that was sampled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from oldlogits.core.engine import Generation
from oldlogits.core.environment import JsonValue, Row
from oldlogits.core.parser import Parser, ToolCall, split_turn
from oldlogits.engines.chat_api.messages import Call, ChatAnswer, ChatRequest, Turn, new_id
from oldlogits.envs.given import named_arguments
from oldlogits.envs.text import readable, spoken
from oldlogits.models.chat.format import ChatFormat

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
    aloud, thoughts = readable(spoken(text)), readable(_thoughts(text))
    if not tools or not is_whole:
        return Turn(content=aloud, thoughts=thoughts, calls=())
    said, found = split_turn(parser, aloud)
    schemas = dict(map(_named_schema, tools))
    calls = [_call(call, schemas) for call in found if isinstance(call, ToolCall)]
    if not calls or len(calls) < len(found) or None in calls:
        return Turn(content=aloud, thoughts=thoughts, calls=())
    return Turn(content=said, thoughts=thoughts, calls=tuple(call for call in calls if call is not None))


def answer_of(chat: ChatFormat, request: ChatRequest, prompt_ids: Sequence[int], sampled: Generation, turn: Turn) -> ChatAnswer:
    """Return the answer to a request, for which a turn was sampled and read."""
    is_cut = sampled.finish_reason != "stop"
    return ChatAnswer(
        turn=turn,
        finish_reason="length" if is_cut else "tool_calls" if turn.calls else "stop",
        prompt_ids=prompt_ids,
        output_ids=sampled.output_ids,
        logprobs=sampled.logprobs,
        texts=[chat.decode([id]) for id in sampled.output_ids] if request.logprobs else (),
    )


def _call(call: ToolCall, schemas: Mapping[str, Row]) -> Call | None:
    """The call with all of its arguments by name; None: no tool takes it."""
    schema = schemas.get(call.name)
    if schema is None or len(call.positional) > len(cast("Row", schema.get("properties") or {})):
        return None
    return Call(id=new_id("call"), name=call.name, arguments=named_arguments(call, schema))


def _named_schema(tool: Mapping[str, JsonValue]) -> tuple[str, Row]:
    function = cast("Row", tool["function"])
    schema = function.get("parameters")
    return str(function["name"]), schema if isinstance(schema, dict) else {}


def _thoughts(text: str) -> str:
    """What a turn thinks: the text before the end of its thoughts, whose beginning may stand in the prompt."""
    thought, closed, _ = text.rpartition(_CLOSE)
    if not closed:
        return text.partition(_OPEN)[2]
    return thought.partition(_OPEN)[2] if _OPEN in thought else thought
