import ast
import dataclasses
import inspect
import itertools
import json
import re
import subprocess
import sys
import textwrap
import typing
from dataclasses import replace

import pytest

from oldlogits.config import schema
from oldlogits.config.check import check, resolve
from oldlogits.config.episodes import EvalConfig
from oldlogits.config.load import _names, config_from_table, known_keys, load_config, override
from oldlogits.config.mixture import MixturePart
from oldlogits.config.schema import RunConfig
from oldlogits.core.environment import McpServer
from oldlogits.core.errors import ConfigError, MissingPolicyError
from oldlogits.core.policies import EXPERIMENTAL_VARIANTS, VARIANTS, find_variant
from oldlogits.core.source import SOURCES, provided


def sections(kind=RunConfig):
    """The config classes of the recipe, `RunConfig` first."""
    nested = [hint for hint in typing.get_type_hints(kind).values() if dataclasses.is_dataclass(hint)]
    return [kind, *(s for inner in nested for s in sections(inner))]


def value_at(config, key):
    for name in key.split("."):
        config = getattr(config, name)
    return config


def default_of(key):
    return value_at(RunConfig(), key)


def table_of(key, value):
    """``a.b`` and v as ``{"a": {"b": v}}``."""
    first, _, rest = key.partition(".")
    return {first: table_of(rest, value) if rest else value}


@pytest.mark.slow
def test_every_key_has_a_docstring_of_its_own():
    for cls in sections():
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
        documented = {
            field.target.id
            for field, text in itertools.pairwise(body)
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
        }
        plain = {f.name for f in dataclasses.fields(cls) if not dataclasses.is_dataclass(typing.get_type_hints(cls)[f.name])}
        assert plain <= documented, f"{cls.__name__}: {plain - documented}"


def test_the_known_keys_are_the_fields_of_the_schema_in_dotted_form():
    keys = known_keys()
    assert len(keys) == len(set(keys)) == sum(len(dataclasses.fields(c)) for c in sections()) - (len(sections()) - 1)
    assert {k for k in keys if "." not in k} == {"variant", "band", "seed", "num_updates", "max_staleness"}
    assert {"trainer.lr", "lockstep.lag", "proximal.source"} <= set(keys)


def test_the_keys_that_the_command_line_promises_exist():
    promised = "variant band seed num_updates max_staleness proximal.source model.path engine.type engine.precision"
    promised += " runtime.type lockstep.lag lockstep.max_lag trainer.lr trainer.minibatches_per_update"
    assert set(promised.split()) <= set(known_keys())


TABLES = {"env.mixture": (MixturePart, "target"), "env.mcp": (McpServer, "url")}
"""Keys that are lists of tables: what each becomes, and a key of it."""


@pytest.mark.parametrize("key", [key for key in known_keys() if key != "objective.preset"])  # which stands for other keys
def test_every_key_is_read_from_a_table_and_only_it_changes(key):
    default = default_of(key)
    if isinstance(default, tuple):
        kind, name = TABLES.get(key, (None, ""))
        written = [{name: "a"}, {name: "b"}] if kind else ["a", "b"]
        read = tuple(kind(**part) for part in written) if kind else ("a", "b")
        assert value_at(config_from_table(table_of(key, written)), key) == read
        return
    plain = resolve(RunConfig())
    assert config_from_table(table_of(key, default)) == plain
    hint = type_of(key)
    choices = [choice for choice in typing.get_args(hint) if choice != default and typing.get_origin(hint) is typing.Literal]
    kinds = [kind for kind in typing.get_args(hint) if typing.get_origin(kind) is None]  # the other one is "auto"
    hint = kinds[0] if kinds and not choices else hint
    other = choices[0] if choices else {str: "other", int: 7, float: 0.125, bool: not default}[hint]
    given = {"variant": "ppo_clip", "band": 1.25, "objective.dual_clip": 1.25, "objective.is_cap": 1.25}
    given |= {f"correction.{name}": 1.25 for name in ("weight_high", "token_high", "veto_high")}
    given |= {"objective.options": {"high": 0.125}}
    other = {**given, "model.forward_dtype": "bf16"}.get(key, other)
    follow = {"trainer.compute": {"model.forward_dtype"}}.get(key, set())  # what "auto" makes of it
    changed = config_from_table(table_of(key, other))
    assert {k for k in known_keys() if value_at(changed, k) != value_at(plain, k)} == {key, *follow}
    assert value_at(changed, key) == other


def type_of(key):
    return typing.get_type_hints(type(section_of(key)))[key.rpartition(".")[2]]


def section_of(key):
    section = key.rpartition(".")[0]
    return getattr(RunConfig(), section) if section else RunConfig()


@pytest.mark.parametrize(
    "table, nearest",
    [
        ({"bnad": 2.0}, "band"),
        ({"max_stalenes": 2}, "max_staleness"),
        ({"trainer": {"learning_rate": 1.0}}, "trainer.lr"),
        ({"trainer": {"step_per_version": 1}}, "trainer.minibatches_per_update"),
        ({"lr": 1.0}, "trainer.lr"),
        ({"trainr": {"lr": 1.0}}, "trainer.lr"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(table, nearest):
    with pytest.raises(ConfigError, match="unknown key in the recipe") as caught:
        config_from_table(table)
    assert caught.value.allowed == f"the nearest known key is '{nearest}'"
    assert caught.value.fix == f"did you mean {nearest}?"


def test_an_unknown_key_that_resembles_nothing_points_to_the_list_of_keys():
    with pytest.raises(ConfigError, match="got: zzz; allowed: the keys of `oldlogits show recipe`"):
        config_from_table({"zzz": 1})


@pytest.mark.parametrize(
    "table, says",
    [
        ({"band": "wide"}, "band takes a number, or auto; got: 'wide'"),
        ({"band": True}, "band takes a number, or auto; got: True"),
        ({"seed": 1.0}, "seed takes a whole number; got: 1.0"),
        ({"seed": True}, "seed takes a whole number; got: True"),
        ({"variant": 3}, "variant takes a string; got: 3"),
        ({"rollout": {"filter_uniform": 1}}, "rollout.filter_uniform takes true or false; got: 1"),
        ({"engine": {"precision": "fp4"}}, "engine.precision has no such choice; got: 'fp4'; allowed: fp32, bf16, fp8, "),
        ({"engine": {"precision": ["fp8"]}}, r"engine.precision has no such choice; got: \['fp8'\]"),
        ({"trainer": 3}, r"\[trainer\] is a table; got: 3"),
        ({"band": {"low": 1.0}}, "band takes a number"),
    ],
)
def test_a_value_of_another_type_is_refused(table, says):
    with pytest.raises(ConfigError, match=says):
        config_from_table(table)


def test_a_whole_number_serves_as_a_number_and_becomes_one():
    value = config_from_table({"band": 2}).band
    assert value == 2.0
    assert type(value) is float


def test_overrides_win_over_the_recipe_and_leave_the_rest(tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text('band = 2.0\nseed = 5\n[trainer]\nlr = 1e-3\nminibatches_per_update = 4\n[engine]\nprecision = "fp8"\n')
    config = load_config(recipe, ["--band", "inf", "--trainer.minibatches-per-update", "1", "--rollout.filter-uniform"])
    assert (config.band, config.seed) == (float("inf"), 5)
    assert (config.trainer.lr, config.trainer.minibatches_per_update) == (1e-3, 1)
    assert (config.engine.precision, config.rollout.filter_uniform) == ("fp8", True)
    unchanged = set(known_keys()) - {"band", "seed", "trainer.lr", "trainer.minibatches_per_update"}
    unchanged -= {"engine.precision", "rollout.filter_uniform"}
    assert all(value_at(config, key) == value_at(resolve(RunConfig()), key) for key in unchanged)


@pytest.mark.slow
@pytest.mark.parametrize("key", known_keys())
def test_every_key_can_be_overridden_by_its_dotted_name(key):
    value = default_of(key)
    section, _, name = key.rpartition(".")
    if isinstance(value, bool):
        arguments = [f"--{section}.{'no-' if value else ''}{name}".replace("_", "-")]
        assert value_at(override(RunConfig(), arguments), key) is not value
    elif isinstance(value, tuple):
        kind, part = TABLES.get(key, (None, ""))
        words = [json.dumps([{part: "a"}, {part: "b"}])] if kind else ["a", "b"]
        read = (kind(**{part: "a"}), kind(**{part: "b"})) if kind else ("a", "b")
        assert value_at(override(RunConfig(), [f"--{key}".replace("_", "-"), *words]), key) == read
    elif isinstance(value, dict):
        assert value_at(override(RunConfig(), [f"--{key}".replace("_", "-"), '{"high": 0.75}']), key) == {"high": 0.75}
    else:
        other = next(
            (text for kind, text in {"int": "3", "float": "0.75"}.items() if re.search(rf"\b{kind}\b", str(type_of(key)))),
            str(value),
        )
        arguments = [f"--{key}".replace("_", "-"), other]
        assert str(value_at(override(RunConfig(), arguments), key)) == other


LISTS = [key for key in known_keys() if isinstance(default_of(key), tuple)]


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("key", LISTS)
def test_every_list_can_be_given_as_json_whatever_it_holds_and_takes_the_place_of_the_whole_list(key, joined):
    kind, part = TABLES.get(key, (None, ""))
    texts = ["--fast", "a b", "[", "-c", 'say "x"']
    given = [{part: text} for text in texts] if kind else texts
    flag, value = f"--{key}".replace("_", "-"), json.dumps(given)
    config = override(RunConfig(), [*([f"{flag}={value}"] if joined else [flag, value]), "--seed", "7"])
    assert value_at(config, key) == tuple(kind(**{part: text}) if kind else text for text in texts)
    assert config.seed == 7
    assert value_at(override(config, [flag, "[]"]), key) == ()


def test_a_list_that_is_no_json_of_its_kind_is_refused_with_an_example():
    with pytest.raises(ConfigError, match=r"""env\.command cannot be read.*fix: --env\.command '\["one", "two"\]'"""):
        override(RunConfig(), ["--env.command", "[python, agent.py]"])
    with pytest.raises(ConfigError, match=r"env\.command\[1\] takes a string"):
        override(RunConfig(), ["--env.command", '["python", 3]'])


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--bnad", "2"], ["--band", "wide"], ["--engine.precision", "fp4"], ["--band"]])
def test_a_wrong_override_exits_with_status_2_and_says_what_is_wrong(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        override(RunConfig(), arguments)
    assert caught.value.code == 2
    assert arguments[0].lstrip("-") in capsys.readouterr().err


def test_an_override_out_of_range_is_refused_like_the_recipe(tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text("")
    with pytest.raises(ConfigError, match=r"band is out of range; got: band = 0\.5"):
        load_config(recipe, ["--band", "0.5"])


@pytest.mark.parametrize("content", [b"band = ", b"band = 2\nband = 3", b"\xff\xfe"])
def test_a_recipe_that_is_no_toml_is_named(content, tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_bytes(content)
    with pytest.raises(ConfigError, match=r"the recipe is no TOML; got: .*r\.toml"):
        load_config(recipe)


def test_a_recipe_that_does_not_exist_is_answered_with_those_that_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"got: gone\.toml; .*try one of: desk, desk_lockstep"):
        load_config(tmp_path.relative_to(tmp_path) / "gone.toml")
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "desk.toml").write_text("")
    with pytest.raises(ConfigError, match=r"try one of: recipes/desk\.toml, desk, "):
        load_config(tmp_path / "gone.toml")


def test_the_default_recipe_is_valid_and_an_empty_recipe_is_the_default(tmp_path):
    (tmp_path / "r.toml").write_text("")
    assert load_config(tmp_path / "r.toml") == resolve(RunConfig())


@pytest.mark.slow
def test_config_loads_a_recipe_without_torch(tmp_path):
    (tmp_path / "r.toml").write_text('variant = "decoupled_async"\n[proximal]\nsource = "arrival"\n')
    code = (
        "import sys; from pathlib import Path; from oldlogits.config.load import load_config;"
        f"c = load_config(Path({str(tmp_path / 'r.toml')!r}), ['--band', '2']); assert c.band == 2;"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_model_seed_is_the_runs_unless_it_is_given():
    assert config_from_table({"seed": 4}).model_seed == 4
    assert config_from_table({"seed": 4, "model": {"seed": 0}}).model_seed == 0


def test_the_largest_lag_is_the_window_in_lockstep_and_the_bound_elsewhere():
    table = {"max_staleness": 6, "runtime": {"type": "lockstep"}, "lockstep": {"max_lag": 2}}
    assert config_from_table(table).window == 2
    assert config_from_table({**table, "runtime": {"type": "local"}, "lockstep": {"max_lag": 2}}).window == 6


def test_every_section_of_the_schema_is_frozen_slotted_and_keyword_only():
    for cls in sections():
        assert cls.__dataclass_params__.frozen, cls
        assert "__slots__" in vars(cls), cls
        assert all(f.kw_only for f in dataclasses.fields(cls)), cls
    assert {c.__name__ for c in sections()} == {
        n for n, c in vars(schema).items() if dataclasses.is_dataclass(c) and (n.endswith("Config") or n == "Correction")
    }


FOLLOWS = {
    "ppo_clip": "snapshot", "decoupled_exact": "snapshot", "ppo_clip_train_infer": "none", "decoupled_async": "arrival",
    "linear_prox": "none", "loglinear_prox": "none", "linear_train_infer": "none", "loglinear_train_infer": "none",
    "ppo_ewma": "ewma", "ppo_ewma_train_infer": "ewma", "aged_train_infer": "aged", "rescore_train_infer": "rescore",
    "mis_balance": "balance",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("variant", [*VARIANTS, *EXPERIMENTAL_VARIANTS])
def test_the_source_follows_from_the_variant_unless_it_is_named(variant, tmp_path):
    (tmp_path / "r.toml").write_text("")
    followed = load_config(tmp_path / "r.toml", ["--variant", variant])
    assert followed.proximal.source == config_from_table({"variant": variant}).proximal.source == FOLLOWS[variant]
    assert provided(SOURCES.find(followed.proximal.source)) == find_variant(variant).needs
    check(followed)


def test_a_source_that_is_named_stays_and_is_refused_where_it_does_not_fit(tmp_path):
    (tmp_path / "r.toml").write_text('[proximal]\nsource = "eager"\n')
    assert load_config(tmp_path / "r.toml").proximal.source == "eager"
    with pytest.raises(MissingPolicyError, match="source 'eager' provides OLD"):
        load_config(tmp_path / "r.toml", ["--variant", "decoupled_async"])


def flag(key):
    return f"--{key}".replace("_", "-")


@pytest.mark.parametrize("old, new", _names("renamed").items())
def test_an_old_key_is_refused_with_the_new_one_named_in_a_recipe_and_on_the_command_line(old, new):
    assert old not in known_keys()
    assert new in known_keys()
    for refused in (lambda: config_from_table(table_of(old, 1)), lambda: override(RunConfig(), [flag(old), "1"])):
        with pytest.raises(ConfigError, match="the key has a new name") as caught:
            refused()
        assert (caught.value.got, caught.value.allowed) == (old, new)
        assert caught.value.fix == f"write {new} instead of {old}"


@pytest.mark.parametrize(
    "words, overlaps",
    [
        (["--eval.overlap", "true"], True),
        (["--eval.overlap=True"], True),
        (["--eval.overlap"], True),
        (["--eval.overlap", "--band", "2"], True),
        (["--eval.overlap", "false", "--band", "2"], False),
        (["--eval.no-overlap"], False),
    ],
)
def test_what_is_true_or_false_is_written_on_the_command_line_as_in_a_recipe(words, overlaps):
    config = override(replace(RunConfig(), eval=EvalConfig(overlap=not overlaps)), words)
    assert (config.eval.overlap, config.band) == (overlaps, 2 if "2" in words else RunConfig().band)


def test_a_word_that_is_neither_true_nor_false_is_refused_by_its_key():
    with pytest.raises(ConfigError, match=r"record\.keep_best cannot be read; got: 'maybe'; allowed: true or false"):
        override(RunConfig(), ["--record.keep-best", "maybe"])


def test_an_old_switch_is_refused_in_both_of_its_forms():
    for word in ("--source.accept-mixed-kv", "--source.no-accept-mixed-kv"):
        with pytest.raises(ConfigError, match=r"write proximal\.accept_mixed_kv instead of source\.accept_mixed_kv"):
            override(RunConfig(), [word])


@pytest.mark.parametrize("name, key", _names("elsewhere").items())
def test_the_name_that_another_project_has_for_a_key_leads_to_ours(name, key):
    assert key in known_keys()
    for table in ({name: 1}, {"algorithm": {name: 1}}):
        with pytest.raises(ConfigError, match="unknown key in the recipe") as caught:
            config_from_table(table)
        assert caught.value.fix == f"did you mean {key}?"
    with pytest.raises(ConfigError, match=f"did you mean {key}"):
        override(RunConfig(), [flag(name), "1"])


@pytest.mark.parametrize(
    "name, says", [("beta", "objective.kl_coefficient where it weighs the divergence"), ("ppo_epochs", "trained once")]
)
def test_what_others_have_and_this_project_has_not_is_said(name, says):
    assert name.rpartition(".")[2] in _names("absent")
    with pytest.raises(ConfigError, match=f"{says}.*fix: remove objective.{name}"):
        config_from_table({"objective": {name: 0.1}})


def test_a_table_of_names_holds_nothing_that_is_a_key():
    tails = {key.rpartition(".")[2] for key in known_keys()}
    assert not set(_names("elsewhere")) & tails
    assert not set(_names("elsewhere")) & set(_names("absent"))
