"""Tests with the packages of other projects: `make test-envs` installs them and runs these, and nothing else collects them."""

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

collect_ignore_glob = [] if find_spec("verifiers") else ["test_*.py"]


@pytest.fixture
def installed(monkeypatch):
    """The environments of verifiers beside this file can be imported, here and by the servers of their tools."""
    folder = str(Path(__file__).with_name("verifiers_environments"))
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")]))
