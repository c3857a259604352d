"""The built-in parsers of tool calls: what they read, what they refuse, and that they read what they write."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oldlogits.core.errors import ConfigError
from oldlogits.core.parser import PARSERS, Malformed, ToolCall
from oldlogits.envs.parsers.hermes import HermesParser
from oldlogits.envs.parsers.plain import PlainParser

plain, hermes = PlainParser(), HermesParser()


WORD = st.from_regex(r"[a-z0-9.,]{1,8}", fullmatch=True)


@pytest.mark.slow
@given(name=WORD, words=st.lists(WORD, max_size=4))
def test_a_plain_call_reads_back_as_it_was_written(name, words):
    call = ToolCall(name=name, positional=tuple(words))
    assert plain.write(call) == " ".join(["<call>", name, *words, "</call>"])
    assert plain.parse(plain.write(call)) == [call]


@pytest.mark.slow
@given(st.lists(WORD, max_size=6))
def test_text_without_call_marks_is_a_message_for_both_parsers(words):
    assert plain.parse(" ".join(words)) == hermes.parse(" ".join(words)) == []


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
    [parsed] = plain.parse(text)
    assert isinstance(parsed, Malformed)
    assert parsed.reason.startswith("error :")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=2), max_leaves=4
)


@pytest.mark.slow
@given(name=WORD, named=st.dictionaries(WORD, JSON, max_size=3), before=WORD)
def test_a_hermes_call_reads_back_as_it_was_written(name, named, before):
    call, body = ToolCall(name=name, named=named), json.dumps({"name": name, "arguments": named})
    assert hermes.parse(f"{before} <tool_call>\n{body}\n</tool_call>") == [call]
    assert hermes.parse(f"{before} {hermes.write(call)} {before}") == [call]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<tool_call>{", "not closed"),
        ("</tool_call>", "without"),
        ("<tool_call>{</tool_call>", "not JSON"),
        ("<tool_call>[]</tool_call>", "write"),
        ('<tool_call>{"name": 3}</tool_call>', "write"),
        ('<tool_call>{"name": "a", "arguments": []}</tool_call>', "write"),
    ],
)
def test_a_hermes_call_with_a_flaw_is_malformed_and_says_which(text, reason):
    [parsed] = hermes.parse(text)
    assert isinstance(parsed, Malformed)
    assert reason in parsed.reason


def test_every_hermes_call_of_a_turn_is_read_in_its_order_whatever_is_wrong_with_its_neighbours():
    text = (
        'I do <tool_call>{"name": "a"}</tool_call> and <tool_call>{</tool_call><tool_call>{"name": "b"}</tool_call><tool_call>'
    )
    first, broken, second, unfinished = hermes.parse(text)
    assert (first, second) == (ToolCall(name="a"), ToolCall(name="b"))
    assert "not JSON" in broken.reason
    assert "not closed" in unfinished.reason


def test_a_mark_inside_of_an_argument_is_text():
    call = ToolCall(name="say", named={"text": "<tool_call> is a mark"})
    assert hermes.parse(hermes.write(call)) == [call]


def test_a_name_that_is_not_built_in_is_refused_with_those_that_are():
    with pytest.raises(ConfigError, match=r"unknown tool-call parser; got: 'xml'; allowed: env\.parser = plain, hermes or"):
        PARSERS.find("xml")


def test_a_class_that_does_not_parse_is_no_parser():
    with pytest.raises(ConfigError, match=r"no tool-call parser; got: Path without parse"):
        PARSERS.find("pathlib:Path")
