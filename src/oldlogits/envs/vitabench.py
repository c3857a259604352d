"""VitaBench from a checkout: deliveries, shops and travels, each task with a world of its own.

`env.adapter = "vitabench"`, `env.target = "FOLDER:DOMAIN"`, or "FOLDER:DOMAIN:chinese". VitaBench itself lets a language model
judge rubrics. Here, a program compares the orders of an episode with those that the task requires, which is stricter in
what is ordered and says nothing of how; a subclass may set `judge` for the rubrics.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import json
import weakref
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any, ClassVar, TypeVar, cast

from pydantic_core import to_jsonable_python

from oldlogits.core.environment import Environment, Row
from oldlogits.envs.tau2.checkout import Tool, import_checkout, split_target
from oldlogits.envs.tau2.episode import Domain, Tau2Episode, World, make_environment

T = TypeVar("T")

Judge = Callable[[Sequence[str], Sequence[Row]], "bool | Awaitable[bool]"]
"""Is given the rubrics of a task and the messages of an episode, and says whether all rubrics are met."""


class VitaWorld:
    """The world of an episode. VitaBench keeps what it knows by thread, so each world has a thread of its own."""

    def __init__(self, module: ModuleType, task: Row, language: str) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="vitabench")
        weakref.finalize(self, self._thread.shutdown, wait=False)
        world = copy.deepcopy(task["environment"])
        self._environment = self._in_thread(lambda: _fresh(module, world, language))

    def call(self, name: str, arguments: Row, requestor: str) -> object:
        """Carry out a call."""
        return self._in_thread(lambda: to_jsonable_python(self._environment.make_tool_call(name, requestor, **arguments)))

    def state(self) -> str:
        """The orders, as JSON."""
        return json.dumps(self.orders(), sort_keys=True)

    def orders(self) -> list[Row]:
        """Return all orders there are, bookings and reservations included."""
        database = self._environment.tools.db
        tables = (getattr(database, name, None) or {} for name in ("orders", "books", "reservations"))
        return self._in_thread(lambda: [cast(Row, to_jsonable_python(order)) for table in tables for order in table.values()])

    def holds(self, assertion: Row) -> bool:
        """Refuse: no task asserts anything."""
        raise NotImplementedError(assertion)

    def _in_thread(self, work: Callable[[], T]) -> T:
        return self._thread.submit(work).result()


def _fresh(module: ModuleType, world: object, language: str) -> Any:  # their environment
    """An environment of theirs, in a thread of which they know nothing yet: its number may be that of one that ended."""
    forget = importlib.import_module("vita.data_model.thread_safe_base").ThreadSafeBase
    for kind in [forget, *forget.__subclasses__()]:
        kind.clear_thread_data()
    return module.get_environment(world, language)


class VitaEpisode(Tau2Episode):
    """An episode of VitaBench."""

    judge: ClassVar[Judge | None] = None

    @property
    def system_prompt(self) -> str:
        """The policy, with the time of the task."""
        return self.domain.policy.replace("{time}", str(cast(Row, self._task["environment"]).get("time", "")))

    async def reply(self, message: str) -> str | None:
        """Let the customer answer; the agent may end the conversation itself."""
        heard = await super().reply(message)
        if "###STOP###" in message:
            self._has_ended, heard = True, None
        return heard

    async def get_reward(self) -> float:  # type: ignore[override]
        """1 where the conversation came to its end, with the orders that the task requires, or as the judge says."""
        if (judge := type(self).judge) is None:
            return super().get_reward()
        said: list[Row] = [{"role": "assistant", "content": message} for message in self._said]
        called: list[Row] = [{"role": "assistant", "tool_call": name, "arguments": given} for name, given in self._calls]
        met = judge(_rubrics(self._task), [*called, *said])
        return float(self._has_ended and (await met if inspect.isawaitable(met) else met))

    def _parts(self) -> dict[str, bool]:
        left = [_ordered(order) for order in cast(VitaWorld, self._world).orders()]
        parts = {}
        for order in _required(self._task):
            if met := (wanted := _ordered(order)) in left:
                left.remove(wanted)
            id = next((order[key] for key in ("order_id", "reservation_id", "book_id") if key in order), "")
            parts[f"an order as {id}"] = met
        return parts

    @classmethod
    def _subset_of(cls, task: Row) -> str:
        return f"{len(_required(task))} orders"


def adapt(target: str) -> type[Environment]:
    """Make the environment class of a domain: the adapter "vitabench".

    Raises:
        ConfigError: There is no such checkout or domain, or it cannot be imported.
    """
    folder, domain, language = split_target(target, "vitabench")
    language = language or "english"
    module = import_checkout(folder, f"vita.domains.{domain}.environment")
    tasks: dict[str, Row] = {task.id: task.model_dump(mode="json") for task in module.get_tasks(language)}
    shown = module.get_environment(None, language)
    tools = cast("list[Tool]", shown.get_tools())

    def open_world(task: Row, is_gold: bool) -> World:
        return VitaWorld(module, task, language)

    return make_environment(
        Domain(
            name=domain,
            policy=shown.get_policy(),
            tools=[json.loads(json.dumps(tool.openai_schema)) for tool in tools],
            tasks=tasks,
            splits={"train": list(tasks), "heldout": list(tasks)},
            open=open_world,
        ),
        VitaEpisode,
    )


def _criteria(task: Row) -> Row:
    return cast(Row, task["evaluation_criteria"] or {})


def _required(task: Row) -> list[Row]:
    states = cast("list[Row]", _criteria(task).get("expected_states") or [])
    return [order for state in states for order in cast("list[Row]", state.get("required_orders") or [])]


def _rubrics(task: Row) -> list[str]:
    states = cast("list[Row]", _criteria(task).get("expected_states") or [])
    named = [rubric for state in states for rubric in cast("list[str]", state.get("state_rubrics") or [])]
    return list(dict.fromkeys([*named, *cast("list[str]", _criteria(task).get("overall_rubrics") or [])]))


def _ordered(order: Row) -> object:
    """What two orders of the same have in common: kind, place, time, guests, products and quantities, whether cancelled."""
    products = cast("list[Row]", order.get("products") or [])
    things = sorted((str(product.get("product_id")), str(product.get("quantity"))) for product in products)
    place, time = order.get("store_id") or order.get("shop_id"), order.get("reservation_time") or order.get("book_time")
    return order.get("order_type"), place, time, order.get("customer_count"), order.get("status") == "cancelled", things
