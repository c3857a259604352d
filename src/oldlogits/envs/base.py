"""From the words of a recipe to an environment class, and the check that a class has the shape of one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Final, Literal, cast

from oldlogits.core.environment import ADAPTERS, ENVIRONMENTS, Environment
from oldlogits.core.errors import EnvironmentShapeError, reading
from oldlogits.envs.given_tools import check_given_tools, given_tools
from oldlogits.envs.tools import check_tool, public_names, tool_names

REMOTE_PROMPT: Final = "_oldlogits_system_prompt"
"""The method of an environment that lives elsewhere which returns the system prompt that it has there."""

ToolErrors = Literal["declared", "answer", "fail"]
"""What `env.tool_errors` says."""


def load_environment(target: str, adapter: str = "class") -> type[Environment]:
    """Make the environment class that a recipe names by `env.target` and `env.adapter`."""
    adapt = ADAPTERS.find(adapter)
    got, allowed = (
        f"env.adapter = {adapter!r}, env.target = {target!r}",
        "a function that makes an environment class of the target",
    )
    fix = "correct env.target, or name another adapter"
    with reading(EnvironmentShapeError, "the environment cannot be made", got=got, allowed=allowed, fix=fix):
        made = adapt(target)
    return check_environment(made)


def import_environment(target: str) -> type[Environment]:
    """Import a class that is written in the shape of an environment, or a function that makes one: the adapter "class"."""
    found = ENVIRONMENTS.find(target)
    if callable(found) and not isinstance(found, type) and not hasattr(found, "get_reward"):
        found = _class_of(found, target)
    return check_environment(found)


def _class_of(factory: Callable[[], object], target: str) -> type:
    """A class whose instances are what a factory makes; the factory is called once to see what that is."""
    try:
        made = type(factory())
    except Exception as error:  # the user's code
        raise EnvironmentShapeError(
            f"the factory {target} raised",
            got=f"{type(error).__name__}: {error}",
            allowed="a function that makes an environment when it is called without arguments",
            fix="give its arguments defaults, or name the class",
        ) from error
    return type(made.__name__, (made,), {"__new__": lambda cls: factory(), "__doc__": made.__doc__})


def check_environment(found: object) -> type[Environment]:
    """Return `found` itself, if it has the shape of an environment.

    Raises:
        EnvironmentShapeError: It is no class, lacks `reset` or `get_reward`, has a tool that has no docstring, takes
            ``*args``, or has a parameter that JSON cannot fill, or it declares something else than exceptions.
    """
    if not isinstance(found, type):
        raise EnvironmentShapeError(
            "an environment is a class",
            got=repr(found),
            allowed="a class, or a function that makes an instance of one",
            fix="name the class, not an instance",
        )
    for name in ("reset", "get_reward"):
        if not callable(inspect.getattr_static(found, name, None)):
            raise EnvironmentShapeError(
                f"{found.__name__} has no method {name}",
                got=f"public names {public_names(found)}",
                allowed="reset(self, **row) -> str | None and get_reward(self) -> float",
                fix=f"define {name}",
            )
    check_given_tools(found)
    for name in tool_names(found) if given_tools(found) is None else ():
        check_tool(found, name)
    answered_errors(found)
    return cast("type[Environment]", found)


def system_prompt_of(environment_class: type[Environment]) -> str:
    """Return the text that the class itself has as `system_prompt`; empty where each episode has its own, or there is none."""
    written = inspect.getattr_static(environment_class, "system_prompt", "")
    return written if isinstance(written, str) else ""


def prompt_of(environment: object) -> object:
    """Return the system prompt of one episode after `reset`: an attribute, a property, or what a method returns."""
    try:
        written = getattr(environment, "system_prompt", "")
        return written() if callable(written) else written
    except NotImplementedError:  # of a base class: there is none
        return ""


def prompt_to_ask(environment: object) -> Callable[[], object] | None:
    """Return how to ask for the system prompt of one episode where that runs the environment's code, or is known elsewhere."""
    if callable(remote := getattr(environment, REMOTE_PROMPT, None)):
        return cast("Callable[[], object]", remote)
    is_text = isinstance(inspect.getattr_static(environment, "system_prompt", ""), str)
    return None if is_text else partial(prompt_of, environment)


def answered_errors(environment_class: type, mode: ToolErrors = "declared") -> tuple[type[Exception], ...]:
    """Return the exceptions of tools that are answers to the agent, by `env.tool_errors` and what the class declares.

    Raises:
        EnvironmentShapeError: The class declares something else than exceptions.
    """
    declared = inspect.getattr_static(environment_class, "tool_errors", ())
    declared = declared if isinstance(declared, tuple) else (declared,)
    strangers = [one for one in declared if not (isinstance(one, type) and issubclass(one, Exception))]
    if strangers:
        raise EnvironmentShapeError(
            f"{environment_class.__name__}.tool_errors is no tuple of exceptions",
            got=repr(strangers[0]),
            allowed="subclasses of Exception, such as tool_errors = (ValueError,)",
            fix="name the exceptions of tools that the agent shall read",
        )
    return {"declared": declared, "answer": (Exception,), "fail": ()}[mode]
