"""The chat format: the tokens of turns put together are the tokens of the whole conversation."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from oldlogits.core.errors import ConfigError
from oldlogits.models.chat.format import ChatFormat
from order_desk.tiny import tiny_tokenizer

WORDS = ("red", "green", "blue", "hi")
TEXT = st.lists(st.sampled_from(WORDS), min_size=1, max_size=4).map(" ".join)
OPEN, CLOSE = "<|im_start|>", "<|im_end|>"

CHATML = (
    "{% for m in messages %}{{ '<|im_start|> ' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|> assistant\\n' }}{% endif %}"
)
THINKING = (  # adds a block to the last assistant turn only: the text before a turn is not a prefix of the text after it
    "{% for m in messages %}{{ '<|im_start|> ' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think> </think> ' }}{% endif %}"
    "{{ m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|> assistant\\n' }}{% endif %}"
)


def _chatml(template: str, eos: str = CLOSE) -> PreTrainedTokenizerFast:
    vocabulary = ["<unk>", "<eos>", OPEN, CLOSE, "system", "user", "assistant", "tool", "<think>", "</think>", *WORDS]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token=eos, additional_special_tokens=[OPEN, CLOSE]
    )
    tokenizer.chat_template = template
    return tokenizer


TOKENIZERS = {"tiny": tiny_tokenizer(WORDS), "chatml": _chatml(CHATML)}
CHATS = {name: ChatFormat(tokenizer, system_prompt="red") for name, tokenizer in TOKENIZERS.items()}

ANSWERS = st.lists(TEXT, min_size=1, max_size=3).map(lambda texts: [("tool", text) for text in texts]) | TEXT.map(
    lambda text: [("user", text)]
)


@pytest.mark.slow
@pytest.mark.parametrize("name", TOKENIZERS)
@given(opening=TEXT, turns=st.lists(st.tuples(TEXT, ANSWERS), max_size=4))
def test_turns_put_together_are_the_conversation_as_the_template_writes_it(name, opening, turns):
    tokenizer, chat = TOKENIZERS[name], CHATS[name]
    messages = [{"role": "system", "content": "red"}, {"role": "user", "content": opening}]
    ids = chat.prompt_ids(opening)
    for said, answers in turns:
        ids += chat.turn_ids(said) + chat.continuation_ids(answers)
        messages += [{"role": "assistant", "content": said}, *({"role": role, "content": text} for role, text in answers)]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert ids == tokenizer.encode(text, add_special_tokens=False)


def test_a_continuation_is_exact_even_where_the_template_rewrites_the_last_turn():
    thinking, plain = ChatFormat(_chatml(THINKING)), ChatFormat(_chatml(CHATML))
    assert thinking.continuation_ids([("tool", "red blue")]) == plain.continuation_ids([("tool", "red blue")])
    tokens = _chatml(CHATML).convert_ids_to_tokens(plain.continuation_ids([("tool", "red blue")]))
    assert tokens == [OPEN, "tool", "red", "blue", CLOSE, OPEN, "assistant"]


def test_a_returned_continuation_is_the_callers_own():
    chat = ChatFormat(TOKENIZERS["tiny"])
    first = chat.continuation_ids([("tool", "red")])
    first.append(-1)
    assert chat.continuation_ids([("tool", "red")]) == first[:-1]


def test_tools_reach_the_template():
    tools = [{"type": "function", "function": {"name": "green"}}]
    chat = ChatFormat(TOKENIZERS["tiny"], tools, "red")
    assert chat.decode(chat.prompt_ids("hi")) == "<system> red tools : green <end> <user> hi <end> <assistant>"


def test_sampling_stops_at_the_end_of_turn_and_at_another_eos():
    same, other = _chatml(CHATML), _chatml(CHATML, eos="<eos>")
    close, eos = same.convert_tokens_to_ids(CLOSE), other.convert_tokens_to_ids("<eos>")
    assert (ChatFormat(same).end_of_turn_id, ChatFormat(same).stop_ids) == (close, (close,))
    assert (ChatFormat(other).end_of_turn_id, ChatFormat(other).stop_ids) == (close, (close, eos))


@given(TEXT)
def test_a_decoded_turn_is_its_text_with_or_without_its_stop_token(text):
    chat = CHATS["tiny"]
    ids = chat.turn_ids(text)
    assert chat.decode(ids) == chat.decode(ids[:-1]) == text
    assert ids[-1] == chat.end_of_turn_id


def test_an_empty_turn_decodes_to_nothing():
    chat = ChatFormat(TOKENIZERS["tiny"])
    assert chat.decode([]) == chat.decode([chat.end_of_turn_id]) == ""


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ m.content + ' red ' }}{% endfor %}",
        "{% for m in messages %}{{ '<|im_start|>' if m.role == 'assistant' else m.content }}{% endfor %}",
    ],
)
def test_a_template_without_end_of_turn_or_without_content_is_refused(template):
    with pytest.raises(ConfigError, match="chat template"):
        ChatFormat(_chatml(template))
