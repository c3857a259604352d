"""The shape of an environment, and how a recipe names one."""

from __future__ import annotations

import pytest

from oldlogits.core.errors import ConfigError, EnvironmentShapeError
from oldlogits.envs.base import answered_errors, check_environment, load_environment, system_prompt_of
from oldlogits.envs.tools import tool_schemas
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


class Questions:
    """An environment without tools."""

    def reset(self, question: str = "?") -> str:
        return question

    def get_reward(self) -> float:
        return 0.0


def test_an_environment_without_tools_is_one():
    assert check_environment(Questions) is Questions
    assert tool_schemas(Questions) == []


class Priced(Shop):
    """A shop with a stock."""

    def __init__(self, stock: int) -> None:
        self.stock = stock

    @staticmethod
    def make_row(split: str, index: int) -> dict[str, int]:
        return {"index": index}


def priced_shop() -> Priced:
    return Priced(stock=7)


def broken_factory() -> Priced:
    raise RuntimeError("no stock")


def test_a_factory_is_an_environment_whose_episodes_are_what_it_makes():
    found = load_environment(f"{__name__}:priced_shop")
    made = found()
    assert (type(made), made.stock) == (Priced, 7)
    assert made is not found()
    assert tool_schemas(found) == tool_schemas(Priced)
    assert (found.__name__, found.__doc__, found.make_row("train", 3)) == ("Priced", "A shop with a stock.", {"index": 3})


def test_a_factory_that_raises_and_a_function_that_makes_no_environment_are_refused():
    with pytest.raises(EnvironmentShapeError, match=r"broken_factory raised; got: RuntimeError: no stock"):
        load_environment(f"{__name__}:broken_factory")
    with pytest.raises(EnvironmentShapeError, match="has no method reset"):
        load_environment("os:getcwd")


class Own(Shop):
    @property
    def system_prompt(self) -> str:
        return "of this episode"


def test_a_system_prompt_that_is_no_text_of_the_class_is_left_to_the_episode():
    assert system_prompt_of(Own) == ""


def test_exceptions_that_are_answers_are_those_that_the_class_declares_or_the_recipe_says():
    class Declares(Shop):
        tool_errors = (KeyError, ValueError)

    assert answered_errors(Declares) == (KeyError, ValueError)
    assert answered_errors(Declares, "answer") == (Exception,)
    assert answered_errors(Declares, "fail") == answered_errors(Shop) == ()
    with pytest.raises(EnvironmentShapeError, match=r"Wrong\.tool_errors is no tuple of exceptions; got: 'KeyError'"):
        check_environment(type("Wrong", (Shop,), {"tool_errors": ("KeyError",)}))
