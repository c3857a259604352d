"""One door for every kind of thing that a recipe names: built-in names, and "package.module:Name" for anything else.

    SOURCES.find("snapshot")                a built-in name
    SOURCES.find("my_package.mine:Mine")    a class or function of the user's own, imported by the same code

A built-in name stands for such a path as well, so nothing is imported before a recipe asks for it.
"""

from __future__ import annotations

import difflib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Generic, TypeVar, cast

from oldlogits.core.errors import ConfigError

T = TypeVar("T")


class Registry(Generic[T]):
    """The built-in names of one kind of thing, and the import of those that are not built in.

    Args:
        kind: The kind in words, such as "loss"; errors name it.
        key: The recipe key that names one, such as "objective.loss".
        builtin: The import path "package.module:Name" of each built-in name.
        needs: Attributes that whatever is found must have; a class or function without one is refused by name.
    """

    def __init__(self, kind: str, *, key: str, builtin: Mapping[str, str], needs: tuple[str, ...] = ()) -> None:
        self.kind, self.key, self.needs = kind, key, needs
        self.builtin: Mapping[str, str] = MappingProxyType(dict(builtin))

    @property
    def names(self) -> tuple[str, ...]:
        """The built-in names, in the order of their registration."""
        return tuple(self.builtin)

    def find(self, name: str) -> T:
        """Import the class or function that a built-in name or "package.module:Name" stands for.

        A module of the working directory may be named too.
        """
        path = self.builtin.get(name, name)
        module_name, _, attribute = path.partition(":")
        if not module_name or not attribute:
            near = difflib.get_close_matches(name, self.names, n=1)
            fix = (
                f"did you mean '{near[0]}'?"
                if near
                else "choose one of these"
                if self.names
                else "name a module and what is in it"
            )
            raise self._error(f"unknown {self.kind}", repr(name), fix)
        found = self._import(module_name, name)
        for part in attribute.split("."):
            if not hasattr(found, part):
                raise self._error(
                    f"the {self.kind} '{name}' does not exist",
                    f"no {part} in {module_name}",
                    "correct the name behind the colon",
                )
            found = getattr(found, part)
        lacking = [need for need in self.needs if not hasattr(found, need)]
        if lacking:
            raise self._error(
                f"'{name}' is no {self.kind}", f"{attribute} without {', '.join(lacking)}", f"define {', '.join(lacking)}"
            )
        return cast(T, found)

    def _import(self, module_name: str, name: str) -> object:
        """Import a module; one that lies in the working directory is found like one that is installed."""
        here = str(Path.cwd())
        if here not in sys.path:
            sys.path.append(here)
        try:
            return importlib.import_module(module_name)
        except (Exception, SystemExit) as error:  # the user's module: whatever it raises is told as its own
            raise self._error(
                f"the module of the {self.kind} '{name}' cannot be imported",
                f"{type(error).__name__}: {error}",
                "install the package that holds it, or run in the folder where it lies",
            ) from error

    def _error(self, what: str, got: str, fix: str) -> ConfigError:
        builtin = f"{', '.join(self.names)} or " if self.names else ""
        return ConfigError(what, got=got, allowed=f'{self.key} = {builtin}"package.module:Name"', fix=fix)


def require(extra: str, *packages: str, what: str) -> None:
    """Refuse `what` by a `ConfigError` where one of the packages that an extra installs is missing."""
    if missing := [package for package in packages if importlib.util.find_spec(package) is None]:
        raise ConfigError(
            f"{what} needs a package that is not installed",
            got=f"no {', '.join(missing)}",
            allowed=f"the extra '{extra}'",
            fix=f"pip install 'oldlogits[{extra}]'",
        )
