"""Several runs on one page."""

import re
import shutil
from xml.etree import ElementTree

import pytest

from oldlogits.cli.main import run
from oldlogits.record.report.comparison import write_comparison


def text_of(path):
    html = path.read_text(encoding="utf-8").removeprefix("<!doctype html>")
    return " ".join(" ".join(ElementTree.fromstring(html).itertext()).split())


@pytest.fixture
def two(fake_run):
    """Two runs of the same name in two folders; the second has another learning rate."""
    one = fake_run(6)
    other = shutil.copytree(one, one.parent / "again" / one.name)
    config = other / "config.toml"
    config.write_text((one / "config.toml").read_text() + "\n[trainer]\nlr = 0.125\n")
    (one / "config.toml").write_text((one / "config.toml").read_text() + "\n[trainer]\nlr = 0.5\n")
    return one, other


def test_curves_lie_over_each_other_and_only_what_differs_in_the_recipes_is_listed(two, tmp_path):
    text = text_of(write_comparison(two, tmp_path / "page.html"))
    for said in ("Held-out success, sampled", "Reward in training", "held-out success after", "trainer.lr 0.5 0.125"):
        assert said in text
    assert "num_updates " not in text.partition("What their recipes say otherwise")[2]
    html = (tmp_path / "page.html").read_text()
    reward = html[html.index("<h3>Reward in training</h3>") :]
    assert len(re.findall(r'class="line c[01] plain"', reward[: reward.index("</figure>")])) == 2


def test_runs_of_the_same_name_are_told_apart_by_their_folders(two, tmp_path):
    text = text_of(write_comparison(two, tmp_path / "page.html"))
    assert f"again/{two[1].name}" in text


def test_the_command_writes_one_page_of_several_runs_and_refuses_too_many(two, tmp_path, capsys):
    out = tmp_path / "both.html"
    assert run(["report", *map(str, two), "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert out.is_file()
    assert run(["report", *[str(two[0])] * 6]) == 2
    assert "allowed: 2 to 5" in capsys.readouterr().err
    assert run(["report"]) == 2
    assert run(["report", str(two[0]), str(tmp_path)]) == 2


def test_a_run_without_updates_is_compared_by_what_it_has(two, tmp_path):
    events = two[1] / "events.jsonl"
    events.write_text("".join(line for line in events.read_text().splitlines(keepends=True) if '"update"' not in line))
    assert "0 (" in text_of(write_comparison(two, tmp_path / "page.html"))
