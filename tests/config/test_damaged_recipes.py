"""Shipped recipes with a value that no run can use: refused at the door, with what, got, allowed and fix."""

import random
import shlex
import tomllib
from pathlib import Path

import pytest
import tomli_w

from oldlogits.cli.main import run
from oldlogits.config.load import known_keys

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("desk*.toml"))
ODD = (
    *(
        "9" * 5000,
        "9" * 400,
        "9223372036854775808",
        "-9223372036854775809",
        "1000000000",
        "-1",
        "0",
        "0x7fffffffffffffffffffff",
    ),
    *("1e308", "-1e308", "1e-300", "1e400", "inf", "-inf", "nan", "0.0", "true", "1979-05-27", "1979-05-27T07:32:00Z"),
    *("[]", "[1]", '["x", "x"]', "{}", "{ a = 1 }", "[" * 3000 + "]" * 3000, "{ a = " * 200 + "1" + " }" * 200),
    *('""', '"x"', '"' + "x" * 5000 + '"', '"\\u0000"', '"a:b"', '"..:x"', '"json:loads"', '"http://[::1"', '"\U0001f600"'),
)
"""TOML as it is written."""


def refused_or_fine(words, capsys):
    """The exit status of a dry run; one that refuses says why in four parts, or is tyro's."""
    try:
        status, by_tyro = run(list(map(str, words))), False
    except SystemExit as ended:
        status, by_tyro = ended.code, True
    said = capsys.readouterr().err
    assert status in (0, 2), (words, said)
    assert "Traceback" not in said
    if status == 2 and not by_tyro:
        assert all(f"{part}: " in said for part in ("error", "got", "allowed", "fix")), said
        assert max(map(len, said.splitlines())) < 12_000
    return status, said


def flat(table, prefix=""):
    """Every key of nested tables as a line of TOML on its own: dotted name and value."""
    lines = {}
    for name, value in table.items():
        if isinstance(value, dict):
            lines |= flat(value, f"{prefix}{name}.")
        else:
            lines[prefix + name] = tomli_w.dumps({"x": value}).removeprefix("x = ").strip()
    return lines


MUST_BE_REFUSED = {
    "trainer.lr": ("1e308", "1e-300", "nan", "inf", "0.0"),
    "sampling.temperature": ("1e-300", "1e308", "nan", "inf"),
    "rollout.group_size": ("1000000000", "9" * 400, "9" * 5000),
    "rollout.prompts_per_update": ("1000000000", "9223372036854775808"),
    "num_updates": ("1000000000", "9" * 5000),
    "max_staleness": ("1000000000",),
    "seed": ("9223372036854775808", "-1"),
    "band": ("nan", "0.0", "9" * 5000, "[" * 3000 + "]" * 3000),
    "trainer.num_threads": ("1000000000",),
    "engine.max_num_seqs": ("1000000000",),
    "engine.recover_s": ("1e308", "inf"),
    "model.lora_rank": ("1000000000",),
    "versions.budget_bytes": ("9223372036854775808",),
    "model.path": ('"' + "x" * 5000 + '"',),
    "env.train_data": ('"' + "x" * 5000 + '"', '"\\u0000"', '"x"'),
    "engine.urls": ('["http://[::1"]', '["http://h:port"]'),
}


@pytest.mark.parametrize(
    "key, raw", [(key, raw) for key, raws in MUST_BE_REFUSED.items() for raw in raws], ids=lambda x: x[:20]
)
def test_a_value_beyond_its_use_is_refused_by_its_key_in_a_dry_run(key, raw, tmp_path, capsys):
    recipe = tmp_path / "r.toml"
    recipe.write_text(f"{key} = {raw}\n" + ('engine.type = "vllm"\n' if key in ("engine.urls", "engine.recover_s") else ""))
    status, said = refused_or_fine(["train", recipe, "--dry-run"], capsys)
    assert status == 2
    assert key in said or "cannot be read" in said or "no TOML" in said or "model folder" in said


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b"a = " + b"[" * 100_000, b"a" + b".a" * 900 + b" = 1", b"\xff", b"\0", b"a = '''"]
)
def test_a_recipe_that_no_reader_can_read_is_refused(content, tmp_path, capsys):
    recipe = tmp_path / "r.toml"
    recipe.write_bytes(content)
    assert refused_or_fine(["train", recipe, "--dry-run"], capsys)[0] == 2
    assert refused_or_fine(["play", recipe], capsys)[0] == 2
    assert refused_or_fine(["compare", recipe, "--dry-run"], capsys)[0] == 2


@pytest.mark.parametrize("name", ["x" * 5000 + ".toml", "no.toml", "a\0b.toml", "."])
def test_a_recipe_of_no_such_name_is_refused(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert refused_or_fine(["train", name, "--dry-run"], capsys)[0] == 2


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_with_any_value_changed_is_refused_or_runs_dry(recipe, tmp_path, capsys):
    rng, path = random.Random(recipe.stem), tmp_path / "r.toml"
    whole = flat(tomllib.loads(recipe.read_text()))
    for key in known_keys():
        for raw in rng.sample(ODD, 6):
            lines = {**whole, key: raw}
            path.write_text("".join(f"{name} = {value}\n" for name, value in lines.items()))
            refused_or_fine(["train", path, "--dry-run"], capsys)


@pytest.mark.slow
def test_an_override_of_any_value_is_refused_or_runs_dry(tmp_path, capsys):
    rng, path = random.Random(0), tmp_path / "r.toml"
    path.write_text("")
    for key in known_keys():
        for raw in rng.sample([raw for raw in ODD if len(raw) < 6000], 2):
            refused_or_fine(["train", path, "--dry-run", f"--{key}", *shlex.split(raw)[:1]], capsys)


@pytest.mark.slow
@pytest.mark.parametrize("key", ["trainer.lr", "sampling.temperature", "rollout.group_size", "max_staleness"])
def test_an_override_beyond_its_use_is_refused_like_the_recipe(key, tmp_path, capsys):
    path = tmp_path / "r.toml"
    path.write_text("")
    for raw in MUST_BE_REFUSED[key]:
        assert refused_or_fine(["train", path, "--dry-run", f"--{key}", raw], capsys)[0] == 2
