"""Tables and other outputs in a terminal of 80 or 120 columns: no line is too long, and no word is broken."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import typing
from pathlib import Path

import pytest
from rich.console import Console

from oldlogits.cli.main import run, usage
from oldlogits.cli.show import TABLES, recipe_rows
from oldlogits.cli.table import Rows, packed, wrapped
from oldlogits.config.load import config_from_table, known_keys
from oldlogits.config.reader import fields_by_key
from oldlogits.config.schema import RunConfig

RECIPES = Path(__file__).parents[2] / "recipes"
WIDTHS = [80, 120]
SHOWN = {
    **{f"show {name}": ["show", name] for name in TABLES},
    "usage": ["--help"],
    "bounds": ["bounds"],
    "dry run": ["train", str(RECIPES / "desk.toml"), "--dry-run"],
    "doubtful dry run": [
        "train", str(RECIPES / "desk.toml"), "--dry-run", "--variant", "linear_train_infer", "--band", "1.05"
    ],
}  # fmt: skip
UNBROKEN = {"model.lora_targets"}  # its default alone is longer than 80 characters


def words(text):
    return text.split()


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", SHOWN)
def test_no_line_of_an_output_is_longer_than_the_terminal(name, width, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    assert run(SHOWN[name]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if len(line.rstrip()) > width and not line.startswith("lora_targets")] == []


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", TABLES)
def test_no_cell_of_a_table_is_broken_in_the_middle_of_a_word(name, width, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    assert run(["show", name]) == 0
    shown = words(capsys.readouterr().out)
    for row in TABLES[name].rows():
        if row[0] not in UNBROKEN:
            missing = [word for cell in row for word in words(cell) if word not in shown and f"{word}:" not in shown]
            assert missing == [], row[0]


def test_wide_terminals_get_columns_and_narrow_ones_blocks():
    table = Rows(("name", "what it is"), [("first", "some words here"), ("second", "")])
    wide, narrow = (Console(width=width, record=True, file=None) for width in (60, 14))
    with wide.capture() as columns:
        wide.print(table)
    with narrow.capture() as blocks:
        narrow.print(Rows(("a-long-name", "what"), [("first-of-all", "words here")]))
    edge = Rows(("name", "text"), [("x", "three short words")])  # 4 + 3 + 17 characters
    for width, heading in ((24, ["name", "text"]), (23, ["x"])):
        console = Console(width=width)
        with console.capture() as at_the_edge:
            console.print(edge)
        assert at_the_edge.get().splitlines()[0].split() == heading
    assert [line.split() for line in columns.get().splitlines()[2:]] == [["first", "some", "words", "here"], ["second"]]
    assert [line.rstrip() for line in blocks.get().splitlines()] == ["first-of-all", "    what:", "    words here"]


def test_parts_are_packed_whole():
    assert packed(["a: 1", "b: 2", "c: three"], 16) == ["    a: 1   b: 2", "    c: three"]


def test_a_word_that_is_longer_than_a_line_stays_whole():
    path = "/a/very/long/path/without-any-space/config.json"
    assert wrapped(f"there is no {path}", 24, later="  ") == ["there is no", f"  {path}"]


@pytest.mark.slow
def test_the_recipe_is_shown_with_what_each_key_allows():
    allowed = {key: text for key, _, text, _ in recipe_rows()}
    assert list(allowed) == list(known_keys())
    for key, choices in {
        "objective.mismatch_correction": "weight_and_mask, mask",
        "objective.loss_aggregation": "token-mean, token-mean-kept, sequence-mean, constant",
        "objective.advantage": "group-normalised, mean-only, leave-one-out, batch-normalised, token-normalised, "
        "batch-baseline, turn-to-go",
        "engine.precision": "fp32, bf16, fp8, int8, int4, fp8_dynamic",
        "engine.kv": "recompute, stale",
        "lockstep.lag": "fresh_first, even, skewed, random",
        "band": "a number > 1, or inf, or auto",
        "trainer.beta2": "a number in [0, 1)",
        "model.seed": "a whole number from 0 to 4294967295, or auto",
        "rollout.filter_uniform": "true or false",
    }.items():
        assert allowed[key] == choices
    assert allowed["runtime.type"] == 'lockstep, local, ray, or "package.module:Name"'
    assert allowed["variant"].startswith("ppo_clip, ppo_clip_train_infer, decoupled_exact, ")


def test_every_default_is_shown_as_a_recipe_would_have_it():
    shown = tomllib.loads("\n".join(f"{key} = {default}" for key, default, _, _ in recipe_rows()))
    assert config_from_table(shown) == config_from_table({})


@pytest.mark.slow
def test_every_choice_and_every_bound_of_a_key_stands_in_what_is_shown():
    allowed = {key: text for key, _, text, _ in recipe_rows()}
    for key, hint in fields_by_key(RunConfig).items():
        for choice in typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ():
            assert choice in allowed[key].split(", ")
        if {int, float} & {hint, *typing.get_args(hint)} and not key.startswith("sampling."):
            assert re.search(r">|in [(\[]|from \d+ to \d+", allowed[key]), key


def test_every_verb_has_a_line_that_fits():
    assert max(map(len, usage().splitlines())) <= 80


@pytest.mark.slow
def test_an_error_is_wrapped_in_a_terminal_and_one_line_a_part_elsewhere():
    done = subprocess.run([sys.executable, "-m", "oldlogits", "show", "x"], capture_output=True, text=True)
    assert [line.split(":")[0].strip() for line in done.stderr.splitlines()] == ["error", "got", "allowed", "fix"]
