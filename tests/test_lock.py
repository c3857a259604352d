"""The locks name every package that the project asks for, at exact versions, and no place to get it from."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LINE = re.compile(r"[a-z0-9][a-z0-9.-]*==[0-9][0-9a-z.+!]*( ; [^/@]+)?")
EXTRAS = PROJECT["project"]["optional-dependencies"].values()
ENVS = ("constraints-envs.in", "constraints-envs.txt")
PEERS = ("constraints-peers.in", "constraints-peers.txt")
DIRECT = [*PROJECT["project"]["dependencies"], *(line for lines in EXTRAS for line in lines)]


def locked(name):
    lines = [line for line in (ROOT / name).read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    assert [line for line in lines if not LINE.fullmatch(line)] == []
    return {line.partition("==")[0] for line in lines}


@pytest.mark.parametrize(
    "name, at_least",
    [("constraints.txt", 100), ("constraints-vllm.txt", 150), ("constraints-envs.txt", 120), ("constraints-peers.txt", 120)],
)
def test_a_lock_holds_nothing_but_names_exact_versions_and_where_they_apply(name, at_least):
    assert len(locked(name)) >= at_least


def test_what_the_project_asks_for_is_locked():
    names = {re.match(r"[A-Za-z0-9._-]+", line).group().lower() for line in DIRECT}
    assert names - {"oldlogits"} <= locked("constraints.txt")


def test_what_is_pinned_on_purpose_is_locked_so():
    for pinned, lock in (("constraints.in", "constraints.txt"), ("constraints-vllm.in", "constraints-vllm.txt"), ENVS, PEERS):
        exact = re.findall(r"^[^#\s]+==[^#\s]+", (ROOT / pinned).read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert exact
        assert set(exact) <= set((ROOT / lock).read_text(encoding="utf-8").splitlines())
