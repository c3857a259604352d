"""One episode of tau2-bench, whatever the domain: the turns, and the reward as tau2-bench defines it.

reset(task) -> the customer's request
call_tool   -> the world: databases, and the functions that read and change them
reply       -> the customer
get_reward  -> the world's state against that of the gold plan, assertions, and what the agent was to say
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, cast

from pydantic_core import to_jsonable_python

from oldlogits.core.environment import Environment, Row, Split
from oldlogits.core.errors import ConfigError
from oldlogits.envs.tau2.user import GREETING, ScriptedUser, User, is_the_end

INSTRUCTIONS = (
    "You are a customer service agent. Help the customer as the policy below says. In each turn, either write a message to "
    "the customer or call a tool."
)


class World(Protocol):
    """The databases of one episode, and the functions that work on them."""

    def call(self, name: str, arguments: Row, requestor: str) -> object:
        """Carry out a call of the agent ("assistant") or of the customer ("user"); what it raises is an answer."""

    def state(self) -> str:
        """Return a text that is the same for the same content of the databases."""

    def holds(self, assertion: Row) -> bool:
        """Return whether an assertion of a task is true of the databases."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Domain:
    """A domain of tau2-bench.

    Args:
        policy: What the agent is told to keep to.
        tools: The agent's tools, as JSON schemas.
        tasks: The tasks by their ids, as tau2-bench writes them.
        splits: The ids of the tasks of training and of held-out ones.
        open: Makes the world of a task; with True the one in which its gold plan is carried out.
        is_solo: Whether the agent has the customer's tools as well and no customer: the task's ticket is all it reads.
    """

    name: str
    policy: str
    tools: Sequence[Row]
    tasks: Mapping[str, Row]
    splits: Mapping[Split, Sequence[str]]
    open: Callable[[Row, bool], World]
    is_solo: bool = False
    gold: dict[str, tuple[str, bool]] = field(default_factory=dict)

    def gold_state(self, task: Row) -> tuple[str, bool]:
        """Return the state in which the gold plan of a task leaves the databases, and whether it changes them; found once."""
        if (id := str(task["id"])) not in self.gold:
            world = self.open(task, True)
            before = world.state()
            for action in actions_of(task):
                try:
                    world.call(str(action["name"]), cast(Row, action["arguments"]), str(action.get("requestor") or "assistant"))
                except Exception:  # as in tau2-bench: a gold plan may contain a call that fails
                    continue
            self.gold[id] = (world.state(), world.state() != before)
        return self.gold[id]


class Tau2Episode:
    """An environment of a domain: a subclass has a `domain` and, as `tool_schemas`, its tools.

    `make_user` makes the customer of a task; a subclass may name one that is a language model.
    """

    domain: ClassVar[Domain]
    tool_schemas: ClassVar[Sequence[Row]]
    tool_errors = (Exception,)
    make_user: ClassVar[Callable[[Row], User]] = ScriptedUser

    async def reset(self, *, task: str, subset: str = "") -> str:
        """Begin a task; `subset` is for whoever counts results."""
        self._task = self.domain.tasks[task]
        self._world = self.domain.open(self._task, False)
        self._user = type(self).make_user(self._task)
        self._said: list[str] = []
        self._calls: list[tuple[str, Row]] = []
        self._has_ended = False
        return str(self._task["ticket"]) if self.domain.is_solo else await self._hear(GREETING) or ""

    @property
    def system_prompt(self) -> str:
        """The policy."""
        return f"<instructions>\n{INSTRUCTIONS}\n</instructions>\n<policy>\n{self.domain.policy}\n</policy>"

    def call_tool(self, name: str, arguments: Row) -> object:
        """Carry out a call of the agent."""
        self._calls.append((name, arguments))
        if isinstance(self._user, ScriptedUser):
            self._user.called(name)
        result = self._world.call(name, arguments, "assistant")
        return result if isinstance(result, str) else to_jsonable_python(result)

    async def reply(self, message: str) -> str | None:
        """Let the customer answer; without a customer, a message is the end."""
        self._said.append(message)
        heard = None if self.domain.is_solo else await self._hear(message)
        self._has_ended = heard is None
        return heard

    async def _hear(self, message: str) -> str | None:
        said = self._user.reply(message)
        said = await said if inspect.isawaitable(said) else said
        return None if said is None or is_the_end(said) else said

    def get_reward(self) -> float:
        """1 where the conversation came to its end and everything is as the task says; the product of its parts."""
        return float(self._has_ended and all(self._parts().values()))

    def explain_reward(self) -> str:
        """What was as the task says, and what was not."""
        parts = {"the conversation ended": self._has_ended} | self._parts()
        return "\n".join(f"{'yes' if met else 'no '}  {part}" for part, met in parts.items())

    def _parts(self) -> dict[str, bool]:
        """The parts of the reward that a program can judge, by what they are."""
        criteria = cast(Row, self._task["evaluation_criteria"])
        basis = cast("list[str]", criteria.get("reward_basis") or ["DB", "COMMUNICATE"])
        parts = {}
        if "DB" in basis:
            parts["databases as the gold plan leaves them"] = self._world.state() == self.domain.gold_state(self._task)[0]
        if "ENV_ASSERTION" in basis:
            for assertion in cast("list[Row]", criteria.get("env_assertions") or []):
                parts[f"assertion {assertion['func_name']} {assertion.get('arguments')}"] = self._world.holds(assertion)
        if "ACTION" in basis:
            parts |= {f"call {action['name']}": any(_is(action, *c) for c in self._calls) for action in actions_of(self._task)}
        if "COMMUNICATE" in basis:
            said = [message.lower().replace(",", "") for message in self._said]
            for info in cast("list[str]", criteria.get("communicate_info") or []):
                parts[f"said {info}"] = any(info.lower() in message for message in said)
        return parts

    @classmethod
    def make_row(cls, split: Split, index: int) -> Row:
        """Tasks in their order, again and again; `subset` says whether the gold plan changes the databases."""
        ids = cls.domain.splits[split]
        task = cls.domain.tasks[ids[index % len(ids)]]
        return {"task": str(task["id"]), "subset": cls._subset_of(task)}

    @classmethod
    def _subset_of(cls, task: Row) -> str:
        return "changes" if cls.domain.gold_state(task)[1] else "keeps"


def actions_of(task: Row) -> list[Row]:
    """Return the gold plan of a task."""
    return cast("list[Row]", cast(Row, task["evaluation_criteria"]).get("actions") or [])


def make_environment(domain: Domain, base: type[Tau2Episode] = Tau2Episode) -> type[Environment]:
    """Make the environment class of a domain, a subclass of `base`.

    Raises:
        ConfigError: A split has no tasks.
    """
    for split, ids in domain.splits.items():
        if not ids:
            raise ConfigError(
                f"the domain {domain.name} has no tasks to play",
                got=f"no {split} tasks of {len(domain.tasks)}",
                allowed="at least one task",
                fix="name another split, or look whether the files of the domain are complete",
            )
    return cast(
        "type[Environment]",
        type(f"{base.__name__}_{domain.name}", (base,), {"domain": domain, "tool_schemas": list(domain.tools)}),
    )


def _is(action: Row, name: str, arguments: Row) -> bool:
    """Whether a call is that of a gold plan, in the arguments that it is compared by."""
    compared = cast("list[str] | None", action.get("compare_args"))
    expected = cast(Row, action["arguments"])
    if name != action["name"]:
        return False
    keys = arguments.keys() if compared is None else compared
    return {k: v for k, v in arguments.items() if k in keys} == {k: v for k, v in expected.items() if k in keys}
