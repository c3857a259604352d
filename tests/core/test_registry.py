import sys

import pytest

from oldlogits.core.errors import ConfigError
from oldlogits.core.registry import Registry

THINGS = Registry[type]("thing", key="section.thing", builtin={"path": "pathlib:Path"}, needs=("exists",))


def test_a_built_in_name_and_its_import_path_lead_to_the_same_object():
    assert THINGS.find("path") is THINGS.find("pathlib:Path")


def test_a_nested_name_behind_the_colon_is_followed():
    assert Registry("thing", key="k", builtin={}).find("collections:OrderedDict.fromkeys").__name__ == "fromkeys"


def test_a_module_of_the_working_directory_is_found(tmp_path, monkeypatch):
    (tmp_path / "own_thing.py").write_text("class Own:\n    exists = True\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    assert THINGS.find("own_thing:Own").exists


@pytest.mark.parametrize(
    "name, says",
    [
        ("paht", r"unknown thing; got: 'paht'; .*path or \"package.module:Name\".*did you mean 'path'"),
        (":Name", "unknown thing"),
        ("module:", "unknown thing"),
        ("no_such_module_anywhere:Name", "cannot be imported; got: ModuleNotFoundError"),
        ("pathlib:Missing", "does not exist; got: no Missing in pathlib"),
        ("json:dumps", "is no thing; got: dumps without exists"),
    ],
)
def test_what_is_not_there_is_refused_with_what_to_do(name, says):
    with pytest.raises(ConfigError, match=says):
        THINGS.find(name)


def test_what_a_users_module_raises_at_import_is_told(tmp_path, monkeypatch):
    (tmp_path / "broken_thing.py").write_text("1 / 0\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="ZeroDivisionError: division by zero"):
        THINGS.find("broken_thing:Own")
