"""The shape of an environment, and how a recipe names one."""

from __future__ import annotations

import pytest

from oldlogits.core.errors import ConfigError, EnvironmentShapeError
from oldlogits.envs.base import check_environment, load_environment, system_prompt_of
from order_desk.environment import OrderDesk


class Shop:
    system_prompt = "a shop"

    def reset(self, index: int = 0) -> str:
        return f"hello {index}"

    def get_reward(self) -> float:
        return 1.0

    def flag(self, on: bool) -> str:
        """Set."""
        return repr(on)


def _without(name: str) -> type:
    return type("Broken", (), {key: value for key, value in vars(Shop).items() if key != name})


@pytest.mark.parametrize("name", ["reset", "get_reward"])
def test_a_class_without_reset_or_get_reward_is_refused_by_name(name):
    with pytest.raises(EnvironmentShapeError, match=f"Broken has no method {name}"):
        check_environment(_without(name))


def test_a_tool_without_docstring_is_refused_with_the_remedy():
    class Silent(Shop):
        def mystery(self) -> str:
            return ""

    with pytest.raises(EnvironmentShapeError, match=r"Silent\.mystery is public.*rename it to _mystery"):
        check_environment(Silent)


def test_a_tool_that_takes_any_arguments_is_refused():
    class Loose(Shop):
        def anything(self, *words: str) -> str:
            """Take all."""
            return ""

    with pytest.raises(EnvironmentShapeError, match=r"Loose\.anything takes any number"):
        check_environment(Loose)


def test_an_instance_is_refused():
    with pytest.raises(EnvironmentShapeError, match="an environment is a class"):
        check_environment(Shop())


def test_a_target_is_a_short_name_or_a_module_and_a_class():
    assert load_environment("desk") is OrderDesk
    assert load_environment("order_desk.environment:OrderDesk") is OrderDesk


@pytest.mark.parametrize("target", ["dest", "a:", ":B", "no.such.module:X", "order_desk.environment:Nothing"])
def test_a_target_that_names_nothing_is_a_config_error_that_says_what_is_allowed(target):
    with pytest.raises(ConfigError, match="desk"):
        load_environment(target)


@pytest.mark.parametrize("adapter", ["clas", "no.such.module:X"])
def test_an_adapter_that_names_nothing_is_refused_by_its_key(adapter):
    with pytest.raises(ConfigError, match=r"env\.adapter = class"):
        load_environment("desk", adapter)


def test_what_an_adapter_makes_is_checked_like_any_class():
    with pytest.raises(EnvironmentShapeError, match="an environment is a class"):
        load_environment("anything", f"{__name__}:make_nothing")


def make_nothing(target: str) -> object:
    return target


def test_a_class_without_a_system_prompt_has_an_empty_one():
    assert (system_prompt_of(Shop), system_prompt_of(_without("system_prompt"))) == ("a shop", "")
