"""The changelog has one entry for the version that the package and the project name."""

import re
import tomllib
from pathlib import Path

import oldlogits

ROOT = Path(__file__).parents[1]
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_package_project_and_changelog_name_the_same_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == oldlogits.__version__
    released = re.findall(r"^## (\d+\.\d+\.\d+)$", CHANGELOG, flags=re.MULTILINE)
    assert released[0] == oldlogits.__version__
    assert sorted(released, key=lambda one: [int(part) for part in one.split(".")], reverse=True) == released
    assert len(set(released)) == len(released)


def test_an_entry_is_short_enough_to_be_read():
    entries = re.split(r"^## ", CHANGELOG, flags=re.MULTILINE)[1:]
    assert {entry.split()[0]: len(entry.split()) for entry in entries if len(entry.split()) > 500} == {}
