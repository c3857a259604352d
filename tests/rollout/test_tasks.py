import itertools
import json
from typing import ClassVar

import pytest

from oldlogits.cli.main import run
from oldlogits.core.errors import ConfigError, EnvironmentShapeError
from oldlogits.rollout.tasks import ROWS_PER_SEED, TaskDataset


class Maker:
    @staticmethod
    def make_row(split, index):
        return {"split": split, "index": index}


class NoMaker:
    pass


@pytest.fixture
def rows_of(tmp_path):
    """``rows_of(train rows, held-out rows, cls, seed=, eval=)``; rows None: none in a file."""

    def make(train=None, heldout=None, cls=NoMaker, **table):
        env = {}
        for key, rows in {"train_data": train, "eval_data": heldout}.items():
            if rows is not None:
                path = tmp_path / f"{key}.jsonl"
                path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
                env[key] = str(path)
        seed, evaluation = table.get("seed", 0), table.get("eval", {"num_episodes": 1})
        needs_heldout = bool(evaluation["num_episodes"] or evaluation.get("every"))
        return TaskDataset(cls, seed=seed, needs_heldout=needs_heldout, **env)

    return make


FILE = [{"task": i} for i in range(7)]


def passes(rows, num):
    """The tasks of the first passes through the file."""
    return [[rows.train(7 * epoch + i)["task"] for i in range(7)] for epoch in range(num)]


def test_every_pass_through_a_file_has_every_row_once_in_an_order_of_its_own(rows_of):
    orders = passes(rows_of(FILE, FILE), 4)
    assert all(sorted(order) == list(range(7)) for order in orders)
    assert all(a != b for a, b in itertools.combinations(orders, 2))


def test_the_order_depends_on_the_seed_and_on_nothing_else(rows_of):
    assert passes(rows_of(FILE, FILE, seed=1), 3) == passes(rows_of(FILE, FILE, seed=1), 3)
    assert passes(rows_of(FILE, FILE, seed=1), 3) != passes(rows_of(FILE, FILE, seed=2), 3)
    rows = rows_of(FILE, FILE)
    backwards = [rows.train(i) for i in reversed(range(14))]
    assert backwards[::-1] == [rows.train(i) for i in range(14)]


def test_held_out_rows_come_in_order_for_every_seed_and_each_once(rows_of):
    for seed in (0, 1):
        found = [row["task"] for row in rows_of(FILE, FILE[:3], seed=seed).heldout(5)]
        assert found == [0, 1, 2]


def test_rows_that_a_class_makes_differ_between_seeds_in_training_and_not_in_evaluation(rows_of):
    for seed in (0, 3):
        rows = rows_of(cls=Maker, seed=seed)
        assert rows.train(5) == {"split": "train", "index": seed * ROWS_PER_SEED + 5}
        assert list(rows.heldout(2)) == [{"split": "heldout", "index": 0}, {"split": "heldout", "index": 1}]


def test_a_file_goes_before_the_class_and_each_split_has_its_own(rows_of):
    rows = rows_of(FILE, cls=Maker)
    assert "task" in rows.train(0)
    assert list(rows.heldout(1)) == [{"split": "heldout", "index": 0}]


@pytest.mark.parametrize("train, key", [(None, "env.train_data"), (FILE, "env.eval_data")])
def test_a_class_that_makes_no_rows_needs_files(rows_of, train, key):
    with pytest.raises(ConfigError, match=f"NoMaker makes no rows and the recipe names none; got: {key} = ''"):
        rows_of(train)


def test_held_out_rows_are_needed_for_evaluation_only(rows_of):
    rows = rows_of(FILE, eval={"num_episodes": 0})
    assert list(rows.heldout(0)) == []


def test_held_out_rows_are_needed_for_evaluation_during_training_too(rows_of):
    with pytest.raises(ConfigError, match=r"env\.eval_data"):
        rows_of(FILE, eval={"num_episodes": 0, "every": 2})


@pytest.mark.parametrize(
    "content, says",
    [
        (['{"a": 1}\n', "{]\n"], r"a row is no JSON; got: .*train_data\.jsonl:2"),
        (["[1, 2]\n"], r"a row is no object; got: .*train_data\.jsonl:1: \[1, 2\]"),
        ([], "a file of rows is empty"),
        (["\n", "  \n"], "a file of rows is empty"),
    ],
)
def test_a_file_that_holds_no_rows_is_refused_by_line(rows_of, content, says):
    with pytest.raises(ConfigError, match=says):
        rows_of(content, FILE)


def test_blank_lines_between_rows_are_no_rows(rows_of):
    rows = rows_of(['{"task": 1}\n', "\n", '{"task": 2}'], FILE)
    assert sorted(rows.train(i)["task"] for i in range(2)) == [1, 2]


class Takes:
    def reset(self, *, task, hint=""):
        return None


class TakesAnything:
    def reset(self, **row):
        return None


class MakesOthers(Takes):
    @staticmethod
    def make_row(split, index):
        return {"other": index}


def test_a_line_ends_at_a_newline_and_nowhere_else(rows_of):
    text = '{"task": "one\u2028two\u2029three\x85four"}\n{"task": "five"}\r\n'
    rows = rows_of([text], [text])
    assert [row["task"] for row in rows.heldout(5)] == ["one\u2028two\u2029three\x85four", "five"]


def test_a_byte_order_mark_is_no_part_of_the_first_row(rows_of):
    assert rows_of(['\ufeff{"task": 1}\n'], FILE).train(0) == {"task": 1}


@pytest.mark.parametrize(
    "content, says",
    [
        (b'{"task": "\xe4"}\n', r"a row is no JSON; got: .*:1: .*utf-8.*allowed: a JSONL file in UTF-8"),
        (b'{"task": 1}\n{"task": ' + b"[" * 100_000 + b"\n", r"a row is no JSON; got: .*:2: "),
        (b'{"task": ' + b"9" * 5000 + b"}\n", r"a row is no JSON; got: .*:1: "),
        (b'{"task": 1}\n{"tsak": 1}\n', r"a row does not fit Takes\.reset; got: .*:2: .*'task'.*; allowed: .*task, hint=''"),
        (b'{"task": 1, "more": 2}\n', r"a row does not fit Takes\.reset; got: .*:1: .*'more'"),
        (b'{"task": 1, "self": 2}\n', r"a row does not fit Takes\.reset; got: .*:1: .*'self'"),
    ],
)
def test_a_row_that_cannot_be_read_or_does_not_fit_reset_is_refused_by_its_line(content, says, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=says):
        TaskDataset(Takes, seed=0, train_data=str(path), eval_data=str(path))


def test_rows_fit_a_reset_that_takes_anything(rows_of):
    assert rows_of(FILE, FILE, cls=TakesAnything).heldout(1) == FILE[:1]


def test_rows_that_a_class_makes_and_does_not_take_are_refused_at_the_start():
    with pytest.raises(
        EnvironmentShapeError, match=r"MakesOthers\.make_row\('train', 2000000\) does not fit reset; got: .*task"
    ):
        TaskDataset(MakesOthers, seed=2)


def test_rows_that_do_not_fit_end_train_dry_run_and_play_alike(tmp_path, capsys):
    rows, recipe = tmp_path / "rows.jsonl", tmp_path / "r.toml"
    rows.write_text('{"begin": 3}\n')
    env = f'env = {{ target = "tests.runs:Words", train_data = "{rows}", eval_data = "{rows}" }}'
    recipe.write_text(f'{env}\nmodel.path = "{tmp_path}"\n')
    for words in (["train", recipe, "--dry-run"], ["play", recipe]):
        assert run(list(map(str, words))) == 2
        assert "a row does not fit Words.reset" in capsys.readouterr().err
    assert run(["play", "tests.runs:Words", "--row", '{"begin": 3}']) == 2
    assert "--row does not fit the environment" in capsys.readouterr().err


def test_a_class_that_has_the_rows_of_each_split_gives_each_once_a_pass():
    class Few:
        rows: ClassVar = {"train": [{"start": i} for i in range(3)], "heldout": [{"start": 7}]}

        def reset(self, start):
            return f"w{start}"

    few = TaskDataset(Few, seed=1)
    assert [sorted(few.train(i)["start"] for i in range(first, first + 3)) for first in (0, 3)] == [[0, 1, 2]] * 2
    assert few.heldout(5) == [{"start": 7}], "no row is played twice"
