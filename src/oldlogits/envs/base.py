"""From the words of a recipe to an environment class, and the check that a class has the shape of one."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, Literal, Protocol, TypeVar, cast

from oldlogits.core.environment import ADAPTERS, ENVIRONMENTS, Environment
from oldlogits.core.errors import ConfigError, EnvironmentShapeError, reading
from oldlogits.envs.delegate import mixture_of
from oldlogits.envs.given import gives_tools
from oldlogits.envs.rewards import with_reward
from oldlogits.envs.tools import check_tool, public_names, tool_names, tool_schemas

REMOTE_PROMPT: Final = "_oldlogits_system_prompt"
"""The method of an environment that lives elsewhere which returns the system prompt that it has there."""

P = TypeVar("P", bound="Part")

ToolErrors = Literal["declared", "answer", "fail"]
"""What `env.tool_errors` says."""


class Part(Protocol):
    """One environment of a mixture, as a recipe names it."""

    @property
    def target(self) -> str:
        """As `env.target`."""

    @property
    def adapter(self) -> str:
        """As `env.adapter`."""

    @property
    def name(self) -> str:
        """The name that marks its rows; empty: the last part of the target."""


def load_environment(target: str, adapter: str = "class", reward: str = "", mixture: Sequence[Part] = ()) -> type[Environment]:
    """Make the environment class that a recipe names by `env.target`, `env.adapter`, `env.reward` and `env.mixture`."""
    if mixture:
        has_reward = bool(reward)
        mixed = mixture_of({name: _load(part.target, part.adapter, has_reward) for name, part in named_parts(mixture).items()})
        return with_reward(mixed, reward) if reward else mixed
    made = _load(target, adapter, bool(reward))
    return with_reward(made, reward) if reward else made


def named_parts(mixture: Sequence[P]) -> dict[str, P]:
    """Return the environments of a mixture by the names that mark their rows.

    Raises:
        ConfigError: Two have the same name.
    """
    named = {part.name or re.split(r"[:.]", part.target)[-1]: part for part in mixture}
    if len(named) < len(mixture):
        raise ConfigError(
            "two environments of the mixture have the same name",
            got=f"env.mixture of {', '.join(part.name or part.target for part in mixture)}",
            allowed="a name of its own for each",
            fix="add name = ... to one of them",
        )
    return named


def _load(target: str, adapter: str, has_reward: bool) -> type[Environment]:
    adapt = ADAPTERS.find(adapter)
    got, allowed = (
        f"env.adapter = {adapter!r}, env.target = {target!r}",
        "a function that makes an environment class of the target",
    )
    fix = "correct env.target, or name another adapter"
    with reading(EnvironmentShapeError, "the environment cannot be made", got=got, allowed=allowed, fix=fix):
        made = adapt(target)
    return check_environment(made, has_reward=has_reward)


def import_environment(target: str) -> type[Environment]:
    """Import a class that is written in the shape of an environment, or a function that makes one: the adapter "class"."""
    found = ENVIRONMENTS.find(target)
    if callable(found) and not isinstance(found, type) and not hasattr(found, "get_reward"):
        found = class_of(found, target)
    return cast("type[Environment]", found)


def class_of(factory: Callable[[], object], target: str) -> type:
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

    def new(cls: type) -> object:
        instance = factory()
        if cls is not own:  # a subclass that was made of this one
            instance.__class__ = cls
        return instance

    own = type(made.__name__, (made,), {"__new__": new, "__init__": lambda self: None, "__doc__": made.__doc__})
    return own


def check_environment(found: object, *, has_reward: bool = False) -> type[Environment]:
    """Return `found` itself, if it has the shape of an environment; `get_reward` may be left out where `has_reward`.

    Raises:
        EnvironmentShapeError: It is no class, lacks `reset` or `get_reward`, has a tool that has no docstring, takes
            ``*args``, or has a parameter that JSON cannot fill, or it declares something else than exceptions,
            or describes its tools otherwise than by schemas.
    """
    if not isinstance(found, type):
        raise EnvironmentShapeError(
            "an environment is a class",
            got=repr(found),
            allowed="a class, or a function that makes an instance of one",
            fix="name the class, not an instance",
        )
    for name in ("reset",) if has_reward else ("reset", "get_reward"):
        if not callable(inspect.getattr_static(found, name, None)):
            raise EnvironmentShapeError(
                f"{found.__name__} has no method {name}",
                got=f"public names {public_names(found)}",
                allowed="reset(self, **row) -> str | None and get_reward(self) -> float",
                fix=f"define {name}" + (", or name a function in env.reward" if name == "get_reward" else ""),
            )
    for name in () if gives_tools(found) else tool_names(found):
        check_tool(found, name)
    tool_schemas(found)
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
