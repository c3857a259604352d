"""From the words of a recipe to an environment class, and the check that a class has the shape of one."""

from __future__ import annotations

import inspect
from typing import cast

from oldlogits.core.environment import ADAPTERS, ENVIRONMENTS, Environment
from oldlogits.core.errors import EnvironmentShapeError
from oldlogits.envs.tools import check_tool, public_names, tool_names


def load_environment(target: str, adapter: str = "class") -> type[Environment]:
    """Make the environment class that a recipe names by `env.target` and `env.adapter`."""
    return check_environment(ADAPTERS.find(adapter)(target))


def import_environment(target: str) -> type[Environment]:
    """Import a class that is written in the shape of an environment: the built-in adapter "class"."""
    return check_environment(ENVIRONMENTS.find(target))


def check_environment(found: object) -> type[Environment]:
    """Return `found` itself, if it has the shape of an environment.

    Raises:
        EnvironmentShapeError: It is no class, lacks `reset` or `get_reward`, has no tool, or has a tool that has no docstring,
            takes ``*args``, or has a parameter that JSON cannot fill.
    """
    if not isinstance(found, type):
        raise EnvironmentShapeError(
            "an environment is a class", got=repr(found), allowed="a class", fix="name the class, not an instance"
        )
    for name in ("reset", "get_reward"):
        if not callable(inspect.getattr_static(found, name, None)):
            raise EnvironmentShapeError(
                f"{found.__name__} has no method {name}",
                got=f"public names {public_names(found)}",
                allowed="reset(self, **row) -> str | None and get_reward(self) -> float",
                fix=f"define {name}",
            )
    for name in tool_names(found):
        check_tool(found, name)
    if not tool_names(found):
        raise EnvironmentShapeError(
            f"{found.__name__} has no tool",
            got=f"public names {public_names(found)}",
            allowed="at least one further public method with a docstring",
            fix="add a tool",
        )
    return cast("type[Environment]", found)


def system_prompt_of(environment_class: type[Environment]) -> str:
    """Return the class's `system_prompt`, or an empty text."""
    return str(inspect.getattr_static(environment_class, "system_prompt", ""))
