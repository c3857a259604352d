"""`oldlogits workers`: the wish is written where the run reads it."""

from dataclasses import asdict

import tomli_w

from oldlogits.backends.ray.desired_workers import read_wanted
from oldlogits.cli.main import run
from oldlogits.config.load import config_from_table


def folder(tmp_path, runtime):
    config = config_from_table({"runtime": {"type": runtime}})
    (tmp_path / "config.toml").write_text(tomli_w.dumps(asdict(config)))
    return str(tmp_path)


def test_the_wish_is_read_by_the_run(tmp_path, capsys):
    assert run(["workers", folder(tmp_path, "ray")]) == 0
    assert "2 workers are wanted" in capsys.readouterr().out
    assert read_wanted(tmp_path) is None
    assert run(["workers", str(tmp_path), "--num", "5"]) == 0
    assert "5 workers are wanted" in capsys.readouterr().out
    assert read_wanted(tmp_path) == 5


def test_what_cannot_be_wished_is_refused_and_changes_nothing(tmp_path, capsys):
    assert run(["workers", str(tmp_path), "--num", "5"]) == 2
    assert "there is no run" in capsys.readouterr().err
    assert run(["workers", folder(tmp_path, "local"), "--num", "5"]) == 2
    assert "runtime ray" in capsys.readouterr().err
    assert run(["workers", folder(tmp_path, "ray"), "--num", "0"]) == 2
    assert read_wanted(tmp_path) is None


def test_a_file_that_is_no_wish_says_so(tmp_path, capsys):
    for text in ("", "{", "[]", '{"num_workers": true}', '{"num_workers": 0}', '{"num_workers": "3"}'):
        (tmp_path / "workers.json").write_text(text)
        assert run(["workers", folder(tmp_path, "ray")]) == 2
        assert "no wish for workers" in capsys.readouterr().err
