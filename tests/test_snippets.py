"""Snippets of all documents are what they say: Python compiles, TOML and JSON are read, commands name verbs that exist."""

import ast
import json
import re
import tomllib
from pathlib import Path

import pytest

from oldlogits.cli.main import VERBS

ROOT = Path(__file__).parents[1]
FOLDERS = ("docs", "examples", "studies", "benchmarks")
PAGES = [*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.md")))]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PAGES}
FENCE = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)


def read_json(text: str) -> None:
    """One value, or one on each line."""
    try:
        json.loads(text)
    except json.JSONDecodeError:
        for line in text.splitlines():
            json.loads(line)


READERS = {
    "python": lambda text: compile(text, "snippet", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT),
    "toml": tomllib.loads,
    "json": read_json,
}


@pytest.mark.parametrize("page", TEXTS)
def test_every_snippet_can_be_read(page):
    for language, text in FENCE.findall(TEXTS[page]):
        READERS.get(language, str)(text)


@pytest.mark.parametrize("page", TEXTS)
def test_every_verb_of_a_command_exists(page):
    in_fences = [text for language, text in FENCE.findall(TEXTS[page]) if language in ("bash", "sh", "console")]
    named = [
        verb for text in in_fences for verb in re.findall(r"(?:^|[;&] |-m |\$ )oldlogits ([a-z]+)", text, flags=re.MULTILINE)
    ]
    named += re.findall(r"`oldlogits ([a-z]+)\b", TEXTS[page])
    assert [verb for verb in named if verb not in VERBS] == []


def test_there_is_something_to_read():
    found = [language for text in TEXTS.values() for language, _ in FENCE.findall(text)]
    assert {language for language in READERS if found.count(language) > 2} >= {"python", "toml"}
