"""What docs/security.md says of the source holds."""

import ast
import re
import stat
import sys
from pathlib import Path

import pytest

from oldlogits.config.load import config_from_table
from oldlogits.core.errors import ConfigError, TokenTableError
from oldlogits.core.server import LOOPBACK
from oldlogits.doctor.readers.pickled import load_torch, unpickle
from oldlogits.engines.server.app import check_host
from oldlogits.engines.shared_memory import shared_file
from oldlogits.record.watch.server import WatchServer

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "oldlogits"
TREES = {path.relative_to(SOURCE).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in SOURCE.rglob("*.py")}


def calls(tree):
    """Dotted name and node of every call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_nothing_is_evaluated_and_no_shell_is_started():
    for name, tree in TREES.items():
        for called, node in calls(tree):
            assert called not in ("eval", "exec", "os.system", "os.popen"), name
            assert not [word for word in node.keywords if word.arg in ("shell", "trust_remote_code")], name


def test_pickles_are_read_in_the_two_files_that_the_page_speaks_of():
    modules = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
    importing = {
        name
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if (isinstance(node, ast.Import) and modules & {one.name for one in node.names})
        or (isinstance(node, ast.ImportFrom) and node.module in modules)
    }
    assert importing == {"doctor/readers/pickled.py", "backends/ray/exchange.py"}
    loading = {name for name, tree in TREES.items() for called, _ in calls(tree) if called == "torch.load"}
    assert loading == {"doctor/readers/pickled.py"}


def test_model_folders_are_read_from_this_machine_alone():
    found = [node for tree in TREES.values() for called, node in calls(tree) if called.endswith(".from_pretrained")]
    assert len(found) >= 4
    assert [ast.unparse(node) for node in found if "local_files_only=True" not in ast.unparse(node)] == []


class Trap:
    """Runs code where it is unpickled."""

    def __reduce__(self):
        return (sys.exit, ("unpickled",))


def test_a_pickle_is_refused_unless_it_is_trusted(tmp_path):
    import pickle

    import torch

    torch.save({"trap": Trap()}, tmp_path / "batch.pt")
    (tmp_path / "batch.pkl").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(TokenTableError, match="unpickle"):
        load_torch(tmp_path / "batch.pt", trust=False)
    with pytest.raises(TokenTableError, match="unpickle"):
        unpickle(tmp_path / "batch.pkl", trust=False)
    with pytest.raises(SystemExit, match="unpickled"):
        unpickle(tmp_path / "batch.pkl", trust=True)


@pytest.mark.parametrize(
    "key", ["proximal.source", "engine.type", "runtime.type", "objective.loss", "env.program", "env.target", "model.path"]
)
def test_a_recipe_that_is_read_as_data_imports_nothing(tmp_path, monkeypatch, key):
    (tmp_path / "a_trap.py").write_text("raise SystemExit('imported')\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    section, _, name = key.partition(".")
    config_from_table({section: {name: "a_trap:Trap"}})
    assert "a_trap" not in sys.modules


def test_other_machines_need_a_token():
    with pytest.raises(ConfigError, match="need a token"):
        check_host("0.0.0.0", "")
    check_host("0.0.0.0", "a token")
    for host in LOOPBACK:
        check_host(host, "")


def test_the_watch_page_listens_on_this_machine_alone(tmp_path):
    with WatchServer(tmp_path, 0) as server:
        assert server.server_address[0] == "127.0.0.1"


def test_weights_in_shared_memory_are_their_users_alone():
    path = shared_file(64)
    try:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    finally:
        path.unlink()


def test_security_md_leads_to_the_page_and_the_page_says_how_to_report():
    assert "(docs/security.md)" in (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    page = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    assert "## Reporting" in page
    for flag in re.findall(r"`(--\w+)`", page):
        assert flag in ("--trust", "--host", "--token")
