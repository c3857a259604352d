"""What docs/troubleshooting.md names exists: errors, recipe keys, metrics, flags of the command line."""

import re
from pathlib import Path

from oldlogits.config.reader import fields_by_key
from oldlogits.config.schema import RunConfig
from oldlogits.core import errors

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
NAMES = re.findall(r"`([^`\n]+)`", PAGE)


def test_every_error_that_is_named_exists_and_those_that_end_a_run_are_named():
    named = {name for name in NAMES if re.fullmatch(r"\w+Error", name)}
    assert {name for name in named if not hasattr(errors, name)} == set()
    ending = {"ProbeError", "ExactnessError", "MissingLogprobError", "NonFiniteError", "RolloutError", "RunWriteError"}
    assert ending | {"WorkerDiedError", "AccountingError", "StoreDamagedError", "VersionEvictedError"} <= named


def test_every_key_that_is_named_is_a_key_of_a_recipe():
    named = {name.partition(" = ")[0] for name in NAMES}
    dotted = {name for name in named if re.fullmatch(r"[a-z]+\.\w+", name) and not name.endswith((".jsonl", ".json", ".html"))}
    assert len(dotted) > 15
    assert dotted - set(fields_by_key(RunConfig)) == set()


def test_every_metric_that_is_named_is_documented_elsewhere():
    named = {name for name in NAMES if re.fullmatch(r"[a-z]+/\w+", name)}
    assert len(named) > 6
    others = "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "docs").rglob("*.md") if p.name != "troubleshooting.md")
    assert {name for name in named if f"`{name}`" not in others} == set()


def test_the_texts_that_it_quotes_are_those_of_the_source():
    source = " ".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    quoted = [
        text for row in PAGE.splitlines() if row.startswith('| "') for text in re.findall(r'"([^"]+)"', row.split(" | ")[0])
    ]
    assert len(quoted) >= 3
    assert [text for text in quoted if text not in source] == []
