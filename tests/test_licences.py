"""What a minimal install and the extras bring has a licence that is allowed; one that is unknown or copyleft is refused."""

import subprocess
import sys
from pathlib import Path

import pytest

from tools.licences import MINIMAL, Rules, licence_of, rows

ROOT = Path(__file__).parents[1]
RULES = Rules.read()
NOT_OF_DEV = {"liger", "mcp", "smollm2"}
"""Extras that a contributor's installation does without."""


def test_every_installed_package_has_an_allowed_licence():
    table, missing = rows(RULES)
    assert [(name, licence) for name, _, licence, _, is_allowed in table if not is_allowed] == []
    assert {"torch", "transformers", "numpy", "pydantic"} <= {name for name, _, _, part, _ in table if part == MINIMAL}
    assert {"ray", "peft", "pytest"} <= {name for name, *_ in table}
    assert len(table) > 100
    assert missing.keys() <= NOT_OF_DEV, missing


def test_the_command_prints_the_table():
    words = [sys.executable, "tools/licences.py"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\nok  torch " in done.stdout
    assert done.stdout.splitlines()[-1].endswith("does not allow: none")


@pytest.mark.parametrize(
    "licence", ["MIT", "MIT AND Apache-2.0", "GPL-3.0-only OR MIT", "MPL-2.0 AND (Apache-2.0 OR GPL-2.0-only)"]
)
def test_an_expression_that_can_be_met_is_allowed(licence):
    assert RULES.permits("some-package", licence)


@pytest.mark.parametrize(
    "licence",
    [
        "",
        "GPL-3.0-only",
        "MIT AND GPL-3.0-only",
        "AGPL-3.0-or-later OR Proprietary",
        "MIT AND (GPL-2.0-only OR SSPL-1.0)",
        "UNKNOWN",
    ],
)
def test_one_that_cannot_be_met_or_is_unknown_is_refused(licence):
    assert not RULES.permits("some-package", licence)


def test_a_licence_is_read_from_the_expression_then_the_classifiers_then_the_field():
    classifiers = ["License :: OSI Approved :: MIT License", "Programming Language :: Python"]
    assert licence_of({"License-Expression": "ISC", "License": "GPL"}, classifiers, RULES) == "ISC"
    assert licence_of({"License": "GPL"}, classifiers, RULES) == "MIT"
    assert licence_of({"License": "Apache 2.0\n\nthe text"}, [], RULES) == "Apache-2.0"
    assert licence_of({}, ["License :: OSI Approved"], RULES) == ""


def test_an_exception_widens_a_licence_and_does_not_replace_it():
    assert RULES.permits("some-package", "Apache-2.0 WITH LLVM-exception")
    assert not RULES.permits("some-package", "GPL-3.0-only WITH Classpath-exception-2.0")


def test_a_package_that_is_accepted_by_name_needs_a_reason():
    assert RULES.permits("nvidia-cublas", "LicenseRef-NVIDIA-Proprietary")
    assert all(len(reason.split()) > 4 for reason in RULES.packages.values())
