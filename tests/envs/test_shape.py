"""The shape of an environment: its tools, their schemas, the parsers and the binding of calls."""

from __future__ import annotations

import asyncio
import inspect
import json
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oldlogits.core.errors import ConfigError, EnvironmentShapeError
from oldlogits.envs.desk import OrderDesk
from oldlogits.envs.shape import (
    Malformed,
    ToolCall,
    bind,
    check_environment,
    load_environment,
    parse_hermes,
    parse_plain,
    render_result,
    tool_names,
    tool_schemas,
)


class Base:
    def inherited(self) -> str:
        """From the base."""
        return "base"


class Shop(Base):
    system_prompt = "a shop"

    def __init__(self) -> None:
        self.public_value = 3

    @staticmethod
    def make_row(split: str, index: int) -> dict[str, int]:
        return {"index": index}

    def reset(self, index: int = 0) -> str:
        return f"hello {index}"

    def get_reward(self) -> float:
        return 1.0

    def reply(self, message: str) -> str | None:
        return None

    def zip_code(self, city: str, digits: int = 5, size: Literal["s", "m"] = "s", tags: list[str] | None = None) -> str:
        """Look up.

        Args:
            city: Where.
        """
        return f"{city} {digits!r} {size} {tags}"

    async def add(self, a: int, b: float) -> float:
        """Add."""
        return a + b

    def flag(self, on: bool) -> str:
        """Set."""
        return repr(on)

    def _private(self) -> str:
        return "hidden"


def test_tools_are_the_public_documented_methods_in_the_order_they_are_written():
    assert tool_names(Shop) == ("inherited", "zip_code", "add", "flag")
    assert check_environment(Shop) is Shop


def test_a_schema_says_the_type_of_every_parameter_and_which_are_required():
    assert tool_schemas(Shop)[1] == {
        "type": "function",
        "function": {
            "name": "zip_code",
            "description": "Look up.\n\nArgs:\n    city: Where.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "digits": {"type": "integer"},
                    "size": {"type": "string", "enum": ["s", "m"]},
                    "tags": {"anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "null"}]},
                },
                "required": ["city"],
            },
        },
    }
    assert json.loads(json.dumps(tool_schemas(Shop))) == tool_schemas(Shop)


def _without(name: str) -> type:
    return type("Broken", (), {key: value for key, value in vars(Shop).items() if key != name})


@pytest.mark.parametrize("name", ["reset", "get_reward"])
def test_a_class_without_reset_or_get_reward_is_refused_by_name(name):
    with pytest.raises(EnvironmentShapeError, match=f"Broken has no method {name}"):
        check_environment(_without(name))


def test_a_tool_without_docstring_is_refused_with_the_remedy():
    class Silent(Shop):
        def mystery(self) -> str:
            return ""

    with pytest.raises(EnvironmentShapeError, match=r"Silent\.mystery is public.*rename it to _mystery"):
        check_environment(Silent)


def test_a_tool_that_takes_any_arguments_is_refused():
    class Loose(Shop):
        def anything(self, *words: str) -> str:
            """Take all."""
            return ""

    with pytest.raises(EnvironmentShapeError, match=r"Loose\.anything takes any number"):
        check_environment(Loose)


def test_a_class_without_tools_and_a_non_class_are_refused():
    class Empty:
        def reset(self) -> None: ...

        def get_reward(self) -> float:
            return 0.0

    with pytest.raises(EnvironmentShapeError, match="Empty has no tool"):
        check_environment(Empty)
    with pytest.raises(EnvironmentShapeError, match="an environment is a class"):
        check_environment(Shop())


def test_a_target_is_a_short_name_or_a_module_and_a_class():
    assert load_environment("desk") is OrderDesk
    assert load_environment("oldlogits.envs.desk:OrderDesk") is OrderDesk


@pytest.mark.parametrize("target", ["dest", "a:", ":B", "no.such.module:X", "oldlogits.envs.desk:Nothing"])
def test_a_target_that_names_nothing_is_a_config_error_that_says_what_is_allowed(target):
    with pytest.raises(ConfigError, match="desk"):
        load_environment(target)


WORD = st.from_regex(r"[a-z0-9.,]{1,8}", fullmatch=True)


@pytest.mark.slow
@given(name=WORD, words=st.lists(WORD, max_size=4))
def test_a_plain_call_reads_back_as_it_was_written(name, words):
    assert parse_plain(" ".join(["<call>", name, *words, "</call>"])) == ToolCall(name=name, positional=tuple(words))


@given(st.lists(WORD, max_size=6))
def test_text_without_call_marks_is_a_message_for_both_parsers(words):
    assert parse_plain(" ".join(words)) is None
    assert parse_hermes(" ".join(words)) is None


@pytest.mark.parametrize(
    "text",
    [
        "<call> </call>",
        "<call> a",
        "a </call>",
        "x <call> a </call>",
        "<call> a </call> x",
        "</call> a <call>",
        "<call> a </call> <call> b </call>",
        "<call>",
        "<call> <call> a </call>",
    ],
)
def test_a_plain_call_that_is_not_exactly_one_call_is_malformed(text):
    parsed = parse_plain(text)
    assert isinstance(parsed, Malformed)
    assert parsed.reason.startswith("error :")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=2), max_leaves=4
)


@given(name=WORD, named=st.dictionaries(WORD, JSON, max_size=3), before=WORD)
def test_a_hermes_call_reads_back_as_it_was_written(name, named, before):
    body = json.dumps({"name": name, "arguments": named})
    assert parse_hermes(f"{before} <tool_call>\n{body}\n</tool_call>") == ToolCall(name=name, named=named)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<tool_call>{", "not closed"),
        ("</tool_call>", "without"),
        ("<tool_call>{</tool_call>", "not JSON"),
        ("<tool_call>[]</tool_call>", "write"),
        ('<tool_call>{"name": 3}</tool_call>', "write"),
        ('<tool_call>{"name": "a", "arguments": []}</tool_call>', "write"),
        ('<tool_call>{"name": "a"}</tool_call><tool_call>{"name": "a"}</tool_call>', "one call"),
    ],
)
def test_a_hermes_call_with_a_flaw_is_malformed_and_says_which(text, reason):
    parsed = parse_hermes(text)
    assert isinstance(parsed, Malformed)
    assert reason in parsed.reason


def _run(call: ToolCall) -> object:
    ready = bind(Shop(), call)
    assert not isinstance(ready, Malformed), ready
    result = ready()
    return asyncio.run(_wait(result)) if inspect.isawaitable(result) else result


async def _wait(result):
    return await result


def test_a_bound_call_runs_with_words_converted_to_the_annotated_types():
    assert _run(ToolCall(name="zip_code", positional=("bonn", "7", "m"))) == "bonn 7 m None"
    assert _run(ToolCall(name="zip_code", positional=("12",))) == "12 5 s None"
    assert _run(ToolCall(name="zip_code", named={"city": "bonn", "tags": ["a"]})) == "bonn 5 s ['a']"
    assert _run(ToolCall(name="add", positional=("2", "0.5"))) == 2.5
    assert _run(ToolCall(name="flag", positional=("true",))) == "True"


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (ToolCall(name="fly"), "error : no tool fly ; tools are inherited zip_code add flag"),
        (ToolCall(name="reset"), "error : no tool reset"),
        (ToolCall(name="_private"), "error : no tool _private"),
        (ToolCall(name="inherited", positional=("x",)), "error : inherited takes nothing but got x"),
        (ToolCall(name="add", positional=("1",)), "error : add takes a b but got 1"),
        (ToolCall(name="add", named={"a": 1, "c": 2}), "error : add takes a b but got a c"),
        (ToolCall(name="add", positional=("one", "2")), 'error : add wants a as int but got "one"'),
        (ToolCall(name="add", named={"a": True, "b": 1.0}), "error : add wants a as int but got true"),
        (ToolCall(name="flag", named={"on": 1}), "error : flag wants on as bool but got 1"),
        (ToolCall(name="zip_code", named={"city": 3}), "error : zip_code wants city as str but got 3"),
        (ToolCall(name="zip_code", positional=("a", "1", "xl")), "error : zip_code wants size as Literal['s', 'm']"),
        (ToolCall(name="zip_code", named={"city": "a", "tags": [1]}), "error : zip_code wants tags as"),
    ],
)
def test_a_call_that_does_not_fit_is_answered_and_never_raises(call, reason):
    ready = bind(Shop(), call)
    assert isinstance(ready, Malformed)
    assert ready.reason.startswith(reason)


def test_results_are_rendered_as_text_json_or_str():
    assert [render_result(value) for value in ("a b", {"a": [1, None]}, [True], 2.5, None)] == [
        "a b",
        '{"a": [1, null]}',
        "[true]",
        "2.5",
        "None",
    ]
