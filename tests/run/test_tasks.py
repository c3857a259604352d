"""What is refused before a run begins: a parser, an environment or a model that does not exist or does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest

from oldlogits.config.load import config_from_table
from oldlogits.config.schema import RunConfig
from oldlogits.core.environment import is_model_folder
from oldlogits.core.errors import ConfigError
from oldlogits.run.tasks import load_tasks
from order_desk.environment import OrderDesk

from ..runs import TARGET


class SmallDesk(OrderDesk):
    """A desk of one's own."""


def config(path: str, target: str = "desk", steps: int | str = "auto", parser: str = "plain") -> RunConfig:
    return config_from_table({"model": {"path": path, "warm_start_steps": steps}, "env": {"target": target, "parser": parser}})


@pytest.mark.parametrize("model", ["tiny", "tiny-moe"])
def test_the_tiny_models_play_only_at_desks(model: str):
    for desk in ("desk", "desk_long", "desk_slow", f"{__name__}:SmallDesk"):
        load_tasks(config(model, desk))
    with pytest.raises(
        ConfigError, match=f"the model '{model}' knows only the words of OrderDesk.*got: model.path = '{model}'"
    ):
        load_tasks(config(model, TARGET))


def test_only_an_environment_with_demonstrations_can_warm_start_a_folder(tmp_path: Path):
    load_tasks(config(str(tmp_path), steps=3))
    load_tasks(config(str(tmp_path), TARGET, steps=0))
    with pytest.raises(ConfigError, match=r"the environment Words has no demonstrations; got: model\.warm_start_steps = 3"):
        load_tasks(config(str(tmp_path), TARGET, steps=3))


def test_a_parser_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match="unknown tool-call parser; got: 'xml'"):
        load_tasks(config("tiny", parser="xml"))


def test_a_starting_model_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match="no_such_module"):
        load_tasks(config("no_such_module:model"))


@pytest.mark.parametrize(
    ("path", "is_folder"),
    [
        ("tiny", False),
        ("my_package.models:small", False),
        ("models/mine", True),
        ("tiny2", True),
        ("runs/a:b/model", True),
        ("./a:b", True),
    ],
)
def test_a_path_is_a_folder_unless_it_is_a_built_in_name_or_an_import_path(path: str, is_folder: bool):
    assert is_model_folder(path) is is_folder
