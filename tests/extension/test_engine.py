"""An engine that is registered by its import path trains like a built-in one."""

import numpy as np
import pytest

from oldlogits.config.check import check
from oldlogits.config.load import config_from_table
from oldlogits.core.engine import EngineKind, EngineSpec
from oldlogits.core.errors import ConfigError
from oldlogits.run.run import run

from ..runs import check_accounting, recipe, tokens_of
from .own_engine import LoggingEngine

NAME = "tests.extension.own_engine:OwnEngine"


@pytest.mark.slow
def test_an_engine_of_ones_own_samples_a_lockstep_run_and_is_given_every_version(tiny_folder, tmp_path):
    LoggingEngine.built.clear()
    result = run(recipe(tiny_folder, engine={"type": NAME}), tmp_path / "run")
    assert result.error is None
    [engine] = LoggingEngine.built
    assert engine.versions == [0, 1, 2, 3, 4]
    assert check_accounting(tmp_path / "run")["trained"] == 4 * 3 * 4
    tokens = tokens_of(tmp_path / "run", "log_r_d", "provenance", "trajectory")
    assert set(tokens["provenance"]) == {"exact"}
    assert np.abs(tokens["log_r_d"]).max() <= 1e-4
    assert {name.rpartition("/")[0] for name in engine.requests} >= set(tokens["trajectory"])


@pytest.mark.parametrize(
    "sections, words",
    [
        ({"engine": {"kv": "stale"}}, "recompute"),
        ({"engine": {"urls": ["http://127.0.0.1:1"]}}, "has no servers"),
        ({"runtime": {"type": "ray"}}, "no server offers this engine"),
    ],
)
def test_what_it_does_not_say_that_it_can_do_is_refused(sections, words):
    engine = {"type": NAME, **sections.pop("engine", {})}
    with pytest.raises(ConfigError, match=words):
        check(config_from_table({"engine": engine, **sections}))


def test_a_kind_without_stepped_engines_says_so_and_what_to_do():
    class Unstepped(EngineKind):
        is_stepwise = True

    with pytest.raises(ConfigError, match=r"no method build.*a method build\(spec\)"):
        Unstepped().build(EngineSpec(model_path=""))


def test_an_engine_that_does_not_say_what_it_chose_is_refused_where_that_is_needed():
    table = {"engine": {"type": NAME}, "runtime": {"type": "lockstep"}}
    check(config_from_table(table), needs_model=False)
    with pytest.raises(ConfigError, match=r"which experts it chose.*model\.routing = 'off'"):
        check(config_from_table(table | {"model": {"routing": "recorded"}}), needs_model=False)
