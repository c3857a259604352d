"""Tokenizers of the shapes that public models have, made here: byte-level, Metaspace, Unigram, with a prepending normalizer."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CONTROL = ("<|im_start|>", "<|im_end|>", "<|eot|>", "<s>", "</s>")
MARKERS = ("<tool_call>", "</tool_call>")
TEXTS = ["user assistant system tool hello world said : it is 42 !", 'the order o17 is shipped\n{"a": 1}\n'] * 20

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
WITH_TOOLS = "{% if tools %}{{ '<|im_start|>tools ' + (tools | tojson) + '<|im_end|>' }}{% endif %}" + CHATML
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content + '</s>' }}"
    "{% else %}{{ '<s>[' + m.role + '] ' + m.content + ' [/' + m.role + ']' }}{% endif %}{% endfor %}"
)
LLAMA2_SPACED = LLAMA2.replace("m.content + '</s>'", "' ' + m.content + ' </s>'")
LLAMA3 = (
    "{{ '<s>' }}{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_start|>\\n\\n' + (m.content | trim) + '<|eot|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_start|>\\n\\n' }}{% endif %}"
)
GEMMA = (
    "{{ '<s>' }}{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<|im_start|>' + role + '\\n' + (m.content | trim) + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>model\\n' }}{% endif %}"
)
BARE = (  # nothing but a letter before a message, and nothing after the end of a turn
    "{% for m in messages %}{{ (m.role | first | upper) + ': ' + m.content + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'A: ' }}{% endif %}"
)
TOOL_RESPONSE = CHATML.replace(
    "m.role + '\\n' + m.content",
    "('user\\n<tool_response>\\n' + m.content + '\\n</tool_response>' if m.role == 'tool' else m.role + '\\n' + m.content)",
)
TEMPLATES = {
    "chatml": CHATML,
    "llama2": LLAMA2,
    "llama2-spaced": LLAMA2_SPACED,
    "llama3": LLAMA3,
    "gemma": GEMMA,
    "bare": BARE,
    "tool-response": TOOL_RESPONSE,
}


def byte_level(template: str = CHATML, **options: object) -> PreTrainedTokenizerFast:
    """GPT-2's shape: every text has a spelling, and none begins with an added space."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    return finished(backend, template, **options)


def metaspace(scheme: str, template: str = LLAMA2, *, unigram: bool = False, **options: object) -> PreTrainedTokenizerFast:
    """SentencePiece's shape: spaces are letters, and where `scheme` says so, one is added.

    Schemes: "first" and "always" and "never" of Metaspace; "prepend", the normalizer of older files.
    """
    pieces = sorted({c for text in [*TEXTS, *CONTROL, *MARKERS, "[]/\n_"] for c in text} | {"▁", "▁hello", "he", "llo"})
    if unigram:
        scores = [(piece, -float(1 + i % 7)) for i, piece in enumerate(pieces)]
        model = models.Unigram([("<unk>", 0.0), ("</s>", 0.0), *scores], 0)
    else:
        vocabulary = {piece: i for i, piece in enumerate(["<unk>", "</s>", "<s>", *pieces])}
        model = models.BPE(vocabulary, [("h", "e")], unk_token="<unk>")
    backend = Tokenizer(model)
    if scheme == "prepend":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return finished(backend, template, unk_token="<unk>", **options)


def finished(backend: Tokenizer, template: str, *, rstrip: bool = False, **options: object) -> PreTrainedTokenizerFast:
    """Add the control tokens and the marks of calls; with `rstrip`, those that end a turn swallow the space after them."""
    for token in CONTROL:
        strips = rstrip and token in ("<|im_end|>", "</s>", "<|eot|>")
        backend.add_special_tokens([AddedToken(token, special=True, normalized=False, rstrip=strips)])
    backend.add_tokens([AddedToken(token, normalized=False) for token in MARKERS])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", **options)
    tokenizer.chat_template = template
    return tokenizer


MAKERS = {
    "byte-level": byte_level,
    "rstrip": lambda template: byte_level(template, rstrip=True),
    "split": lambda template: byte_level(template, split_special_tokens=True),
    "first": lambda template: metaspace("first", template),
    "first-rstrip": lambda template: metaspace("first", template, rstrip=True),
    "always": lambda template: metaspace("always", template),
    "never": lambda template: metaspace("never", template),
    "prepend": lambda template: metaspace("prepend", template),
    "unigram": lambda template: metaspace("first", template, unigram=True),
}
"""Shapes of tokenizers, by name; each is given a template."""
