"""tau2-bench from a checkout: its own databases, tools, policies and tasks, played by the turns of this project.

`env.adapter = "tau2"`, `env.target = "FOLDER:DOMAIN"`, or "FOLDER:DOMAIN:SPLIT" with the tasks that are evaluated. Where the
customer has tools of its own (telecom), the agent plays alone, with these tools and the task's ticket: tau2-bench's solo mode.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Final, Protocol, cast

from pydantic import BaseModel

from oldlogits.core.environment import Environment, Row, Split
from oldlogits.core.errors import AbsentCheckoutError, ConfigError
from oldlogits.envs.tau2.episode import Domain, World, make_environment
from oldlogits.envs.tau2.overlay import OverlaidDatabase

FORM: Final = '"FOLDER:DOMAIN", or "FOLDER:DOMAIN:SPLIT"'


class Tool(Protocol):
    """A tool as tau2-bench and VitaBench describe it."""

    openai_schema: Row


class TheirEnvironment(Protocol):
    """What is used of an environment of tau2-bench."""

    tools: object
    user_tools: object
    get_policy: Callable[[], str]
    get_tools: Callable[[], list[Tool]]
    get_user_tools: Callable[[], list[Tool]]
    make_tool_call: Callable[..., object]
    sync_tools: Callable[[], None]
    set_state: Callable[..., None]
    run_env_assertion: Callable[..., bool]
    get_db_hash: Callable[[], str | None]
    get_user_db_hash: Callable[[], str | None]


class CheckoutWorld:
    """The databases of an episode, in an environment of tau2-bench."""

    def __init__(self, environment: TheirEnvironment, assertion: type[BaseModel]) -> None:
        self._environment, self._assertion = environment, assertion

    def call(self, name: str, arguments: Row, requestor: str) -> object:
        """Carry out a call, and what follows of it in the customer's surroundings."""
        result = self._environment.make_tool_call(name, requestor=requestor, **arguments)
        self._environment.sync_tools()
        return result

    def state(self) -> str:
        """The hashes of both databases."""
        return f"{self._environment.get_db_hash()} {self._environment.get_user_db_hash()}"

    def holds(self, assertion: Row) -> bool:
        """Return whether an assertion of a task is true."""
        return self._environment.run_env_assertion(self._assertion.model_validate(assertion), raise_assertion_error=False)


def adapt(target: str) -> type[Environment]:
    """Make the environment class of a domain: the adapter "tau2".

    Raises:
        ConfigError: There is no such checkout or domain, it cannot be imported, or a split has no tasks.
    """
    folder, domain, split = split_target(target, "tau2-bench")
    os.environ.setdefault("TAU2_DATA_DIR", str(folder / "data"))
    module = import_checkout(folder, f"tau2.domains.{domain}.environment")
    assertion = cast("type[BaseModel]", importlib.import_module("tau2.data_model.tasks").EnvAssertion)
    theirs = cast(TheirEnvironment, module.get_environment())
    is_solo = theirs.user_tools is not None
    shown = cast(TheirEnvironment, module.get_environment(solo_mode=True)) if is_solo else theirs
    tools = [*shown.get_tools(), *(shown.get_user_tools() if is_solo else ())]
    models = {task.id: task for task in module.get_tasks() if not is_solo or task.ticket}
    database = None if is_solo else cast(BaseModel, getattr(theirs.tools, "db"))  # noqa: B009

    def open_world(task: Row, is_gold: bool) -> World:
        start = models[task["id"]].initial_state
        if database is not None and start is None:
            environment = module.get_environment(db=OverlaidDatabase(database))
        else:
            environment = copy.deepcopy(theirs if is_gold else shown)
            data, actions = (start.initialization_data, start.initialization_actions) if start else (None, None)
            environment.set_state(initialization_data=data, initialization_actions=actions, message_history=[])
        return CheckoutWorld(environment, assertion)

    return make_environment(
        Domain(
            name=domain,
            policy=shown.get_policy(),
            tools=[json.loads(json.dumps(tool.openai_schema)) for tool in tools],
            tasks={id: model.model_dump(mode="json") for id, model in models.items()},
            splits=_splits(module, list(models), split),
            open=open_world,
            is_solo=is_solo,
        )
    )


def split_target(target: str, project: str) -> tuple[Path, str, str]:
    """Return folder, domain and split (or an empty text) of a target.

    Raises:
        ConfigError: It has another form.
        AbsentCheckoutError: The folder is no checkout.
    """
    folder, _, rest = target.partition(":")
    domain, _, split = rest.partition(":")
    if not domain or not Path(folder, "src").is_dir():
        raise (AbsentCheckoutError if domain else ConfigError)(
            f"this names no checkout of {project}",
            got=f"env.target = '{target}'",
            allowed=f"{FORM}, with the folder that has src/ and data/",
            fix=f"git clone {project}, and name its folder",
        )
    return Path(folder).resolve(), domain, split


def import_checkout(folder: Path, name: str) -> ModuleType:
    """Import a module of a checkout.

    Raises:
        ConfigError: It cannot be imported, or another installation of the same package is imported already.
    """
    if (source := str(folder / "src")) not in sys.path:
        sys.path.insert(0, source)
    allowed = "a checkout whose requirements are installed here"
    try:
        module = importlib.import_module(name)
    except Exception as error:  # code of the checkout
        raise ConfigError(
            "a checkout cannot be imported",
            got=f"{name} in {source}: {type(error).__name__}: {error}",
            allowed=allowed,
            fix="look at the name of the domain, and install what the checkout requires, beside this package",
        ) from error
    if not str(module.__file__).startswith(source):
        raise ConfigError(
            "another installation of the same package was imported",
            got=str(module.__file__),
            allowed=allowed,
            fix="uninstall that one, or use one checkout in a process",
        )
    return module


def _splits(module: ModuleType, ids: Sequence[str], heldout: str) -> Mapping[Split, Sequence[str]]:
    """Training and held-out tasks: those that the domain splits, or all of them for both where it does not."""
    find = getattr(module, "get_tasks_split", None)
    splits = cast("dict[str, list[str]]", (find() if inspect.isfunction(find) else None) or {})
    if heldout and heldout not in splits:
        raise ConfigError(
            "the domain has no such split", got=heldout, allowed=", ".join(splits) or "none", fix="name another one"
        )
    chosen: dict[Split, list[str]] = {
        "train": splits.get("train", list(ids)),
        "heldout": splits.get(heldout or "test", list(ids)),
    }
    known = set(ids)
    return {split: [id for id in names if id in known] for split, names in chosen.items()}
