"""The site builds without a warning, and the pages that are written from the source hold all that the source says."""

import ast
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from oldlogits.cli.main import VERBS
from oldlogits.config.reader import fields_by_key
from oldlogits.config.schema import RunConfig
from oldlogits.core import errors
from oldlogits.core.policies import EXPERIMENTAL_VARIANTS, VARIANTS, Policy
from oldlogits.core.source import SOURCES
from tools.site import stage
from tools.site.error_texts import OTHERS, raised
from tools.site.pages import PAGES, cell, elsewhere

from .waiting import HUNG_S

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def pages():
    return {name: page() for name, page in PAGES.items()}


def first_texts():
    """The constant parts of the first argument of every call of an error of the package, read by itself."""
    kinds = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, errors.OldLogitsError)}
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in kinds and node.args:
                what = node.args[0]
                parts = what.values if isinstance(what, ast.JoinedStr) else [what]
                yield from (one.value for one in parts if isinstance(one, ast.Constant) and len(one.value) > 3)


def test_every_error_text_and_every_error_class_stands_on_the_page_of_errors(pages):
    texts = set(first_texts())
    assert len(texts) > 250
    lost = {text for text in texts if cell(text).strip() not in pages["errors"]}
    assert lost == set()
    for name, kind in vars(errors).items():
        if isinstance(kind, type) and issubclass(kind, errors.OldLogitsError):
            assert f"`{name}`" in pages["errors"]


def test_every_error_says_what_to_do_and_has_a_topic():
    assert {
        (text.kind, text.what) for text in raised() if not text.fix and text.kind not in ("ApiError", "ChatUserError")
    } == set()
    assert {text.module for text in raised() if text.topic == OTHERS} == set()


def test_a_text_that_a_caller_gives_or_that_is_chosen_is_found():
    whats = {text.what for text in raised()}
    assert "unknown tracker" not in whats  # the registry's kind is known to a run alone
    assert "unknown {kind}" in whats
    assert "{what} needs a package that is not installed" in whats


def test_every_recipe_key_stands_on_the_page_of_the_recipe_with_what_it_means(pages):
    for key in fields_by_key(RunConfig):
        [row] = re.findall(rf"^\| `{re.escape(key)}` \| (.+) \|$", pages["recipe"], flags=re.MULTILINE)
        default, allowed, meaning, _ = row.split(" | ")
        assert default != "`-`"
        assert allowed != "-"
        assert len(meaning.split()) > 2, key
    for section in (field.name for field in dataclasses.fields(RunConfig) if dataclasses.is_dataclass(field.type)):
        assert f"## [{section}]" in pages["recipe"]
    assert "`learning_rate`" in next(line for line in pages["recipe"].splitlines() if line.startswith("| `trainer.lr`"))


def test_every_verb_stands_on_the_page_of_the_command_line_with_its_options(pages):
    for verb in VERBS:
        section = pages["command-line"].partition(f"## oldlogits {verb}\n")[2].partition("\n## ")[0]
        assert "usage: oldlogits " in section, verb
        assert "--help" in section, verb
    assert "--dry-run" in pages["command-line"]
    assert "\x1b" not in pages["command-line"]


def test_every_variant_and_source_stands_on_the_page_of_names(pages):
    for name in (*VARIANTS, *EXPERIMENTAL_VARIANTS, *SOURCES.names):
        assert f"| {cell(name)} |" in pages["names"], name
    assert "the old logits" in pages["names"]


def test_names_in_the_glossary_exist_in_the_source():
    rows = re.findall(r"^\| (.+?) \|", (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert len(named) > 8
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    of_policies = {f"logp_{policy}" for policy in Policy}
    assert {name for name in named - of_policies if not re.search(rf"\b{name}\b", source)} == set()


def test_the_glossary_holds_what_others_call_each_key_and_nothing_else():
    page = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    assert page.endswith("\n\n" + elsewhere()), "put what tools.site.pages.elsewhere() gives at the end of docs/glossary.md"


def build(folder):
    words = [sys.executable, "-m", "tools.site", "into", str(folder)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=HUNG_S, check=False)


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_holds_every_document(tmp_path):
    done = build(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    site = tmp_path / "site"
    home = (site / "index.html").read_text(encoding="utf-8")
    for page in (ROOT / "docs").rglob("*.md"):
        address = page.relative_to(ROOT).with_suffix(".html").as_posix().replace("README.html", "index.html")
        assert (site / address).is_file()
        assert f'href="{address}' in home, f"{address} is not in the navigation"
    for name in PAGES:
        assert (site / "reference" / f"{name}.html").is_file()
    written = [path.read_text(encoding="utf-8") for path in site.rglob("*.html")]
    assert not [text for text in written if re.search(r"<p>(```|\| ---)", text)], "a fence or a table that is read as text"


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["[a page](nowhere.md)", "[a heading](adopt.md#no-such-heading)", "[a folder](../nowhere/)"])
def test_a_link_that_leads_nowhere_fails_the_build(tmp_path, wrong):
    page = ROOT / "docs" / "adopt.md"
    words = [sys.executable, "-c", PLANT, str(tmp_path), wrong, str(page.relative_to(ROOT))]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=HUNG_S, check=False)
    assert done.returncode != 0
    assert "WARNING" in done.stderr + done.stdout


PLANT = """
import sys
from pathlib import Path
from tools.site import stage
from tools.site.__main__ import build

folder, wrong, page = sys.argv[1:]
stage.PAGES = {}
read = stage.as_the_builder_reads_it
stage.as_the_builder_reads_it = lambda text, path: read(text + f"\\n{wrong}\\n" * (str(path) == page), path)
sys.exit(build(Path(folder)))
"""
"""Builds the site with a sentence more on one page."""


def test_markdown_of_forges_is_put_into_the_builders_form():
    text = "Words:\n- one\n- two\n| a |\n\n```python file=x.py\n- kept\n```\n[a](../examples/order_desk) [b](../recipes)\n"
    told = stage.as_the_builder_reads_it(text, Path("docs/x.md"))
    assert told.startswith("Words:\n\n- one\n- two\n")
    assert "```python\n- kept\n```\n" in told
    assert "[a](../examples/order_desk/README.md) [b]\n" in told


def test_anchors_are_those_of_forges():
    assert stage.slug("Is it *right*? `r_d` - and why", "-") == "is-it-right-r_d---and-why"
