"""The built-in parsers of tool calls: what they read, what they refuse, and that they read what they write."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oldlogits.core.errors import ConfigError
from oldlogits.core.parser import PARSERS, Malformed, ToolCall, call_writer, make_parser, split_turn
from oldlogits.envs.parsers.hermes import HermesParser
from oldlogits.envs.parsers.llama import LlamaParser
from oldlogits.envs.parsers.plain import PlainParser
from oldlogits.envs.parsers.qwen_coder import QwenCoderParser
from oldlogits.envs.text import spoken
from oldlogits.envs.tools import bind

from ..models.tokenizers import byte_level
from .test_tools import Shop

plain, hermes, llama, qwen = PlainParser(), HermesParser(), LlamaParser(), QwenCoderParser()


def described(**fields):
    """A tokenizer that says how its model writes calls: as Hermes, unless `fields` say otherwise."""
    tokenizer = byte_level()
    tokenizer.response_template = {
        "start_anchor": "<|im_start|>assistant\n",
        "fields": {
            "tool_calls": {
                "open": "<tool_call>",
                "close": "</tool_call>",
                "repeats": True,
                "content": "json",
                "transform": {"type": "function", "function": "{content}"},
            },
            "content": {"content": "text", "close": "<|im_end|>"},
            **fields,
        },
    }
    return tokenizer


template = make_parser("template", described())
ALL = {"plain": plain, "hermes": hermes, "llama": llama, "qwen-coder": qwen, "template": template}


WORD = st.from_regex(r"[a-z0-9.,]{1,8}", fullmatch=True)


@pytest.mark.slow
@given(name=WORD, words=st.lists(WORD, max_size=4))
def test_a_plain_call_reads_back_as_it_was_written(name, words):
    call = ToolCall(name=name, positional=tuple(words))
    assert plain.write(call) == " ".join(["<call>", name, *words, "</call>"])
    assert plain.parse(plain.write(call)) == [call]


@pytest.mark.slow
@given(st.lists(WORD, max_size=6))
def test_text_without_call_marks_is_a_message_for_every_parser(words):
    for parser in ALL.values():
        assert split_turn(parser, " ".join(words)) == (" ".join(words), [])


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
    with pytest.raises(
        ConfigError,
        match=r"unknown tool-call parser; got: 'xml'; allowed: env\.parser = plain, hermes, llama, qwen-coder, template or",
    ):
        PARSERS.find("xml")


def test_a_class_that_does_not_parse_is_no_parser():
    with pytest.raises(ConfigError, match=r"no tool-call parser; got: Path without parse"):
        PARSERS.find("pathlib:Path")


SCRAPS = st.sampled_from(
    [
        *("<tool_call>", "</tool_call>", "<function=", "<function=f>", "</function>", "<parameter=", "<parameter=x>", ">"),
        *("</parameter>", "<|python_tag|>", "<call>", "</call>", "{", "}", "[", "]", '"', ",", ":", ";", "\n", " "),
        *('{"name": "f", "parameters": {}}', '{"name": "f", "arguments": {"x": 1}}', '{"name": ', '{"type": "function", '),
        *("NaN", "1e999", "9" * 4400, "[" * 1200, '{"a":' * 1200, "\\ud800", "\ufeff", "<|im_end|>", "null", '"parameters": 3'),
    ]
)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
@given(st.lists(SCRAPS | st.text(max_size=4), max_size=10).map("".join))
def test_no_text_makes_a_parser_raise_and_what_it_splits_is_what_it_parses(name, text):
    calls = ALL[name].split(text)[1]
    assert calls == ALL[name].parse(text)
    assert all(isinstance(call, ToolCall | Malformed) for call in calls)
    for call in calls:
        if isinstance(call, ToolCall):
            bind(Shop(), call)
            json.dumps([call.named, call.texts], allow_nan=False, ensure_ascii=False).encode()


ANY = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(WORD, inner, max_size=2),
    max_leaves=4,
)
ANY_CALL = st.builds(
    lambda name, named: ToolCall(name=name, named=named), WORD, st.dictionaries(st.text(min_size=1), ANY, max_size=3)
)


@pytest.mark.slow
@pytest.mark.parametrize("parser", [hermes, llama], ids=["hermes", "llama"])
@given(call=ANY_CALL)
def test_whatever_json_can_say_reads_back_as_it_was_written(parser, call):
    assert parser.split(parser.write(call)) == ("", [call])


@pytest.mark.slow
@given(name=WORD, named=st.dictionaries(WORD, ANY, max_size=3))
def test_a_qwen_coder_call_reads_back_as_the_text_that_was_written(name, named):
    texts = {key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for key, value in named.items()}
    written = qwen.write(ToolCall(name=name, named=named))
    if not any("</" in text or "<parameter" in text for text in texts.values()):
        assert qwen.parse(written) == [ToolCall(name=name, texts=texts)]
        assert qwen.split(f"well\n{written}\n{written}")[0] == "well"


def test_an_argument_that_is_text_arrives_as_the_type_of_its_parameter():
    text = (
        "<tool_call>\n<function=add>\n<parameter=a>\n3\n</parameter>\n<parameter=b>0.5</parameter>\n</function>\n</tool_call>"
    )
    [call] = qwen.parse(text)
    assert call == ToolCall(name="add", texts={"a": "3", "b": "0.5"})
    assert bind(Shop(), call).args == (3, 0.5)
    [call] = qwen.parse("<tool_call><function=zip_code><parameter=city>12</parameter></function></tool_call>")
    assert bind(Shop(), call).args == ("12",)
    wrong = bind(Shop(), ToolCall(name="add", texts={"a": "one", "b": "2"}))
    assert wrong == Malformed(reason='error : add wants a as int but got "one"')


@pytest.mark.parametrize(
    "body",
    [
        "add",
        "<function=add>",
        "<function=add><parameter=a>1</function>",
        "<function=add>1</function>",
        "<function=add><parameter=a>1</parameter><parameter=a>2</parameter></function>",
        "<function=>></function>",
    ],
)
def test_a_qwen_coder_call_with_a_flaw_is_malformed(body):
    [parsed] = qwen.parse(f"<tool_call>{body}</tool_call>")
    assert isinstance(parsed, Malformed)


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "add", "parameters": {"a": 1}}',
        ' <|python_tag|>{"name": "add", "parameters": {"a": 1}} ',
        '{"type": "function", "name": "add", "parameters": {"a": 1}}',
        '{"name": "add", "arguments": {"a": 1}}',
    ],
)
def test_a_llama_call_is_bare_or_behind_its_mark(text):
    assert llama.split(text) == ("", [ToolCall(name="add", named={"a": 1})])


def test_several_llama_calls_follow_each_other_and_words_stand_before_the_mark():
    one = '{"name": "add", "parameters": {"a": 1}}'
    call = ToolCall(name="add", named={"a": 1})
    for between in ("; ", "\n", "", "<|python_tag|>"):
        assert llama.parse(one + between + one) == [call, call]
    assert llama.split(f"I add. <|python_tag|>{one}") == ("I add.", [call])
    broken = llama.parse(one + "; {")
    assert broken[0] == call
    assert isinstance(broken[1], Malformed)


@pytest.mark.parametrize(
    "text", ['{"answer": 3}', '{"name": "Ann", "age": 3}', f"I would write {llama.write(ToolCall(name='add'))}", "[1]", "3"]
)
def test_other_json_and_a_call_that_is_mentioned_are_messages_to_a_llama(text):
    assert llama.split(text) == (text, [])


@pytest.mark.parametrize(
    "text",
    ['<|python_tag|>add.call(a="b")', '{"name": "add", "parameters": 3}', '{"name": "add", "param', '<|python_tag|>{"a": 1}'],
)
def test_a_llama_call_with_a_flaw_is_malformed(text):
    [parsed] = llama.parse(text)
    assert isinstance(parsed, Malformed)


def test_a_tokenizers_own_template_reads_calls_and_what_is_said_around_them():
    text = 'I do. <tool_call>{"name": "add", "arguments": {"a": 1, "b": "2"}}</tool_call>'
    call = ToolCall(name="add", named={"a": 1}, texts={"b": "2"})
    assert template.split(text) == ("I do.", [call])
    assert bind(Shop(), call).args == (1, 2.0)
    for flaw in ("{", '{"name": 3}', '{"name": "add", "arguments": {"a": NaN}}'):
        [parsed] = template.parse(f"<tool_call>{flaw}</tool_call>")
        assert isinstance(parsed, Malformed)
    ended = {"open_pattern": r"call (?P<name>\w+) ", "close": "!<|im_end|>", "content": "json", "repeats": True}
    ended["transform"] = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}
    assert make_parser("template", described(tool_calls=ended)).parse('call add {"a": 1}!') == [
        ToolCall(name="add", named={"a": 1})
    ]


@pytest.mark.parametrize("response_template", [None, {}, {"fields": {"content": {"content": "poem"}}, "start_anchor": "a"}])
def test_a_tokenizer_without_a_template_that_can_be_read_is_refused(response_template):
    tokenizer = byte_level()
    tokenizer.response_template = response_template
    with pytest.raises(ConfigError, match=r"env\.parser = 'template' needs a tokenizer with a response template"):
        make_parser("template", tokenizer)
    assert call_writer("template") is None


@pytest.mark.parametrize("name", ALL)
def test_a_call_in_thoughts_is_none(name):
    calls = {
        "plain": "<call> add 1 </call>",
        "llama": llama.write(ToolCall(name="add")),
        "qwen-coder": qwen.write(ToolCall(name="add")),
    }
    call = calls.get(name, hermes.write(ToolCall(name="add")))
    for thoughts in (f"<think>{call}</think>", f"{call}</think>"):
        assert ALL[name].split(spoken(f"{thoughts} no")) == ("no", [])
        assert len(ALL[name].parse(spoken(f"{thoughts}{call}"))) == 1
    assert ALL[name].parse(spoken(f"<think>{call}")) == []
