import pytest

from oldlogits.versions import disk


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    """Nothing that a test sees depends on `fsync`, unless it refuses; thousands of calls of it take minutes."""
    monkeypatch.setattr(disk.os, "fsync", lambda file: None)
