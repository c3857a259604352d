"""Environments that describe their tools themselves, by JSON schemas, the same in all episodes or other ones in each."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oldlogits.core.errors import EnvironmentShapeError
from oldlogits.core.parser import Malformed, ToolCall
from oldlogits.core.trajectory import Context
from oldlogits.envs.base import check_environment
from oldlogits.envs.given import arguments_of, bind_given, checked_schemas
from oldlogits.envs.tools import tool_names, tool_schemas
from oldlogits.models.chat.format import ChatFormat
from oldlogits.rollout.turns import Failure

from ..models.tokenizers import CHATML, WITH_TOOLS, byte_level
from ..rollout.test_agents_words import call, play

ADD = {
    "name": "add",
    "description": "Add numbers.",
    "parameters": {
        "type": "object",
        "properties": {
            "a": {"type": "integer"},
            "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            "options": {"type": ["object", "null"]},
        },
        "required": ["a"],
    },
}
BARE = {"type": "function", "function": {"name": "end"}}


class Server:
    """Its tools are those of a server."""

    tool_schemas = (ADD, BARE)
    tool_errors = (LookupError,)

    def reset(self):
        self.called = []

    async def call_tool(self, name, arguments):
        if arguments.get("a") == 0:
            raise LookupError("nothing")
        self.called.append((name, arguments))
        return {"sum": sum(a["a"] for _, a in self.called if "a" in a)}

    def public(self):
        pass  # no docstring: it is no tool

    def get_reward(self):
        return float(len(self.called))


class PerRow(Server):
    """Its tools are those of the row."""

    tool_schemas = ()

    def reset(self, names):
        super().reset()
        self.tool_schemas = [{"name": name, "description": f"Do {name}.", "parameters": ADD["parameters"]} for name in names]


def calling(name, **arguments):
    return call(json.dumps({"name": name, "arguments": arguments}))


def told(environment, row, *turns, template=WITH_TOOLS):
    chat = ChatFormat(byte_level(template), tool_schemas(environment))
    outcome = play(chat, "hermes", [*turns, *["bye"] * 4], row, environment)
    return outcome, [] if isinstance(outcome, Failure) else [
        chat.decode(s.token_ids) for s in outcome.segments if isinstance(s, Context)
    ]


def test_the_tools_of_a_class_are_those_that_it_describes():
    assert check_environment(Server) is Server
    assert tool_names(Server) == ("add", "end")
    assert [schema["function"]["description"] for schema in tool_schemas(Server)] == ["Add numbers.", ""]
    outcome, texts = told(Server, {}, calling("add", a=2) + calling("end") + calling("add", a=0), calling("reset"))
    assert '"add"' in texts[0]
    results = [text.partition("<|im_end|>")[0] for text in texts[1].split("tool\n")[1:]]
    assert results == ['{"sum": 2}', '{"sum": 2}', "error : nothing"]
    assert "error : no tool reset ; tools are add end" in texts[2]
    assert outcome.reward == 2.0


def test_tools_may_be_others_in_every_episode():
    assert check_environment(PerRow) is PerRow
    assert tool_names(PerRow) == ()
    for names in (["x"], ["y", "z"], []):
        outcome, texts = told(PerRow, {"names": names}, calling("y", a=1))
        assert [f"Do {name}." in texts[0] for name in "xyz"] == [name in names for name in "xyz"]
        assert outcome.reward == float("y" in names)


def test_tools_that_a_template_drops_end_the_episode_that_has_them():
    outcome, _ = told(PerRow, {"names": ["x"]}, template=CHATML)
    assert isinstance(outcome, Failure)
    assert "the chat template drops the name of a tool" in outcome.reason


@pytest.mark.parametrize("written", ["add", [3], [{"description": "x"}], [ADD, ADD], [{**ADD, "default": {1}}]])
def test_schemas_that_describe_no_tools_are_refused(written):
    with pytest.raises(EnvironmentShapeError, match="does not describe tools"):
        checked_schemas(written, "Server")
    outcome, _ = told(type("Wrong", (Server,), {"tool_schemas": property(lambda self: written)}), {})
    assert isinstance(outcome, Failure)
    assert "does not describe tools" in outcome.reason


@pytest.mark.parametrize(
    ("call", "arguments"),
    [
        (ToolCall(name="add", named={"a": 1}), {"a": 1}),
        (ToolCall(name="add", positional=("1", "2")), {"a": 1, "note": "2"}),
        (ToolCall(name="add", texts={"a": "1", "options": '{"b": 2}'}), {"a": 1, "options": {"b": 2}}),
        (ToolCall(name="add", texts={"a": "one"}), {"a": "one"}),
    ],
)
def test_words_become_the_types_of_the_schema(call, arguments):
    assert arguments_of(call, ADD["parameters"]) == arguments


@pytest.mark.parametrize(
    ("call", "got"),
    [
        (ToolCall(name="add"), "nothing"),
        (ToolCall(name="add", named={"a": 1, "c": 2}), "a c"),
        (ToolCall(name="add", positional=("1", "2", "{}", "4")), "1 2 {} 4"),
        (ToolCall(name="add", positional=("1",), named={"a": 2}), "1 a"),
    ],
)
def test_arguments_that_do_not_fit_are_answered(call, got):
    assert arguments_of(call, ADD["parameters"]) == Malformed(reason=f"error : add takes a note options but got {got}")


JSON = st.recursive(st.none() | st.integers() | st.text(max_size=4), lambda inner: st.lists(inner, max_size=2), max_leaves=3)


@given(
    st.sampled_from(["add", "end", "x"]),
    st.lists(st.text(), max_size=4),
    st.dictionaries(st.text(max_size=4), JSON),
    st.dictionaries(st.text(max_size=4), st.text()),
)
def test_no_call_raises_before_it_is_run(name, words, named, texts):
    call = ToolCall(name=name, positional=tuple(words), named=named, texts=texts)
    ready = bind_given(Server(), tool_schemas(Server), call)
    assert isinstance(ready, Malformed) or callable(ready)
