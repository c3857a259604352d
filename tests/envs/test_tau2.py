"""tau2-bench and VitaBench from checkouts: stand-ins of their files and of what is used of their code."""

import asyncio
import json
import sys
import textwrap

import pytest

from oldlogits.core.errors import ConfigError
from oldlogits.envs.base import load_environment
from oldlogits.envs.tau2.user import ScriptedUser
from oldlogits.envs.tools import tool_names
from oldlogits.rollout.tasks import row_misfit

POLICY = "Be kind. It is {time}."


def task(id, *, actions=(), info=(), basis=("DB", "COMMUNICATE"), **more):
    plan = [{"action_id": f"{id}_{i}", "name": n, "arguments": a, "requestor": "assistant"} for i, (n, a) in enumerate(actions)]
    criteria = {"actions": plan, "communicate_info": list(info), "reward_basis": list(basis), "nl_assertions": None}
    told = {
        "reason_for_call": "You want the red hat. Give it to you today.",
        "known_info": "You are Ann.",
        "task_instructions": "You're in a hurry.",
    }
    return {
        "id": id,
        "user_scenario": {"persona": None, "instructions": told},
        "initial_state": None,
        "evaluation_criteria": criteria,
    } | more


TAU2_CODE = """
import copy, hashlib, json, os
from pathlib import Path
from pydantic import BaseModel
from tau2.data_model.tasks import Task

DATA = Path(os.environ["TAU2_DATA_DIR"]) / "tau2" / "domains" / "shop"
LOADS = []

class Order(BaseModel):
    order_id: str
    status: str

class ShopDB(BaseModel):
    orders: dict[str, Order]

class Phone(BaseModel):
    is_on: bool = False

class Kit:
    def __init__(self, db):
        self.db = db

class Tool:
    def __init__(self, name, parameter):
        parameters = {"type": "object", "properties": {parameter: {"type": "string"}}, "required": [parameter]}
        function = {"name": name, "description": name, "parameters": parameters}
        self.openai_schema = {"type": "function", "function": function}

class Environment:
    def __init__(self, db, user_db, solo):
        self.tools, self.user_tools, self.solo = Kit(db), user_db and Kit(user_db), solo
    def get_policy(self):
        return (DATA / "policy.md").read_text()
    def get_tools(self):
        return [Tool("get_order", "order_id"), Tool("cancel_order", "order_id")]
    def get_user_tools(self):
        return [Tool("switch", "to")]
    def make_tool_call(self, tool_name, requestor="assistant", **arguments):
        return getattr(self, tool_name)(**arguments)
    def get_order(self, order_id):
        if order_id not in self.tools.db.orders:
            raise ValueError("Order not found")
        return self.tools.db.orders[order_id]
    def cancel_order(self, order_id):
        order = self.get_order(order_id)
        order.status = "cancelled"
        return order
    def switch(self, to):
        self.user_tools.db.is_on = to == "on"
        return "switched " + to
    def sync_tools(self):
        pass
    def set_state(self, initialization_data, initialization_actions, message_history):
        for action in initialization_actions or []:
            getattr(self, action.func_name)(**action.arguments)
    def run_env_assertion(self, assertion, raise_assertion_error):
        return (self.user_tools.db.is_on is assertion.arguments["is_on"]) == assertion.assert_value
    def get_db_hash(self):
        return hashlib.sha256(json.dumps(self.tools.db.model_dump(), sort_keys=True).encode()).hexdigest()
    def get_user_db_hash(self):
        return self.user_tools and self.user_tools.db.model_dump_json()

def get_environment(db=None, solo_mode=False):
    if db is None:
        LOADS.append(1)
        db = ShopDB.model_validate_json((DATA / "db.json").read_text())
    return Environment(db, Phone() if HAS_PHONE else None, solo_mode)

def get_tasks():
    return [Task.model_validate(task) for task in json.loads((DATA / "tasks.json").read_text())]

def get_tasks_split():
    return json.loads((DATA / "split_tasks.json").read_text())
"""

TASKS_CODE = """
from typing import Any
from pydantic import BaseModel

class EnvFunctionCall(BaseModel):
    env_type: str
    func_name: str
    arguments: dict

class EnvAssertion(EnvFunctionCall):
    assert_value: bool = True

class InitialState(BaseModel):
    initialization_data: Any = None
    initialization_actions: list[EnvFunctionCall] | None = None

class Task(BaseModel):
    id: str
    user_scenario: dict
    initial_state: InitialState | None = None
    evaluation_criteria: dict
    ticket: str | None = None
"""


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text if isinstance(text, str) else json.dumps(text))


@pytest.fixture(autouse=True)
def _no_package_of_another_test(monkeypatch):
    def forget():
        for name in [n for n in sys.modules if n.partition(".")[0] in ("tau2", "vita")]:
            del sys.modules[name]

    forget()
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("TAU2_DATA_DIR", "")  # so that what the adapter sets is undone
    monkeypatch.delenv("TAU2_DATA_DIR")
    yield
    forget()


def tau2(root, tasks, splits=None, *, has_phone=False):
    domain = "data/tau2/domains/shop"
    empty = dict.fromkeys(("__init__", "data_model/__init__", "domains/__init__", "domains/shop/__init__"), "")
    write(
        root,
        {f"src/tau2/{name}.py": text for name, text in empty.items()}
        | {
            "src/tau2/data_model/tasks.py": TASKS_CODE,
            "src/tau2/domains/shop/environment.py": f"HAS_PHONE = {has_phone}\n" + textwrap.dedent(TAU2_CODE),
            f"{domain}/db.json": {"orders": {f"o{i}": {"order_id": f"o{i}", "status": "sent"} for i in range(9)}},
            f"{domain}/policy.md": POLICY,
            f"{domain}/tasks.json": tasks,
            f"{domain}/split_tasks.json": splits or {"train": [tasks[0]["id"]], "test": [t["id"] for t in tasks[1:]]},
        },
    )
    return load_environment(f"{root}:shop", "tau2")


def play(made, id, calls=(), said=("done",) * 4):
    environment = made()
    heard = [asyncio.run(environment.reset(task=id))]
    results = []
    for name, arguments in calls:
        try:
            results.append(environment.call_tool(name, arguments))
        except made.tool_errors as error:
            results.append(f"error : {error}")
    for message in said:
        heard.append(asyncio.run(environment.reply(message)))
        if heard[-1] is None:
            break
    return environment, heard, results


CANCEL = ("cancel_order", {"order_id": "o3"})
SHOP = [
    task("0", actions=[CANCEL]),
    task("1", info=["1786"]),
    task("2", actions=[CANCEL, ("cancel_order", {"order_id": "no"})]),
]


def test_the_reward_is_that_of_the_databases_and_of_what_was_said(tmp_path):
    made = tau2(tmp_path, SHOP)
    reward = lambda *played: play(made, *played)[0].get_reward()  # noqa: E731
    assert reward("0", [CANCEL]) == 1
    assert reward("0") == 0
    assert reward("0", [CANCEL, ("cancel_order", {"order_id": "o4"})]) == 0
    assert reward("1") == 0
    assert reward("1", (), ["It is $1,786."] * 4) == 1
    assert reward("1", [CANCEL], ["It is $1,786."] * 4) == 0
    assert reward("2", [CANCEL]) == 1, "a call of the gold plan that fails changes nothing"


def test_an_episode_whose_conversation_did_not_end_earns_nothing(tmp_path):
    made = tau2(tmp_path, SHOP)
    environment, heard, _ = play(made, "0", [CANCEL], ["done"])
    assert heard[-1] is not None
    assert environment.get_reward() == 0
    assert "no   the conversation ended" in environment.explain_reward()


def test_the_database_is_loaded_once_and_an_episode_does_not_see_another(tmp_path):
    made = tau2(tmp_path, SHOP)
    for _ in range(3):
        assert play(made, "0", [("get_order", {"order_id": "o3"}), CANCEL])[2][0]["status"] == "sent"
    assert sys.modules["tau2.domains.shop.environment"].LOADS == [1]


def test_what_a_tool_raises_is_an_answer_and_results_are_json(tmp_path):
    made = tau2(tmp_path, SHOP)
    _, _, results = play(made, "0", [("get_order", {"order_id": "x"}), CANCEL])
    assert results == ["error : Order not found", {"order_id": "o3", "status": "cancelled"}]


def test_rows_are_the_tasks_of_the_split_and_say_whether_gold_changes_the_database(tmp_path):
    made = tau2(tmp_path, SHOP, {"train": ["0"], "test": ["1", "2"], "base": ["0", "1", "2"]})
    assert [made.make_row("train", i) for i in range(2)] == [{"task": "0", "subset": "changes"}] * 2
    assert [made.make_row("heldout", i) for i in range(3)] == [
        {"task": "1", "subset": "keeps"},
        {"task": "2", "subset": "changes"},
        {"task": "1", "subset": "keeps"},
    ]
    assert row_misfit(made, made.make_row("heldout", 0)) == ""
    everything = load_environment(f"{tmp_path}:shop:base", "tau2")
    assert [everything.make_row("heldout", i)["task"] for i in range(3)] == ["0", "1", "2"]


def test_an_agent_whose_customer_would_have_tools_plays_alone_with_these_tools_and_the_ticket(tmp_path):
    assertion = {"env_type": "user", "func_name": "is_on", "arguments": {"is_on": True}, "assert_value": True}
    off = {"initialization_actions": [{"env_type": "user", "func_name": "switch", "arguments": {"to": "off"}}]}
    one = task("0", actions=[("switch", {"to": "on"})], basis=["ENV_ASSERTION"], ticket="No signal.", initial_state=off)
    one["evaluation_criteria"]["env_assertions"] = [assertion]
    made = tau2(tmp_path, [one, task("1")], {"train": ["0"], "test": ["0"]}, has_phone=True)
    assert tool_names(made) == ("get_order", "cancel_order", "switch")
    assert list(made.domain.tasks) == ["0"], "a task without a ticket needs a customer"
    environment, heard, _ = play(made, "0", [("switch", {"to": "on"})])
    assert (heard, environment.get_reward()) == (["No signal.", None], 1)
    assert play(made, "0")[0].get_reward() == 0


def test_the_scripted_customer_says_all_that_it_was_told_in_the_first_person_and_agrees_after_calls():
    user = ScriptedUser(task("0"))
    assert user.reply("Hi!") == "I want the red hat. Give it to me today.\nI am Ann."
    assert user.reply("Anything else?") == "I'm in a hurry."
    user.called("get_order")
    assert user.reply("Shall I?") == "Yes, please go ahead. If everything is done, just say so."
    assert user.reply("Done.") is None


@pytest.mark.parametrize(
    "target, said",
    [
        ("/nowhere:shop", "no checkout"),
        ("{root}", "no checkout"),
        ("{root}:zoo", "cannot be imported"),
        ("{root}:shop:best", "no such split"),
    ],
)
def test_what_is_no_checkout_or_no_domain_is_refused(tmp_path, target, said):
    tau2(tmp_path, SHOP)
    with pytest.raises(ConfigError, match=said):
        load_environment(target.format(root=tmp_path), "tau2")


VITA_CODE = """
import json
from pathlib import Path
from types import SimpleNamespace
from pydantic import BaseModel
from vita.data_model.thread_safe_base import ThreadSafeBase

class Task(BaseModel):
    id: str
    environment: dict
    user_scenario: dict
    instructions: str
    evaluation_criteria: dict | None = None

class Tool:
    openai_schema = {"type": "function", "function": {"name": "order", "description": "Order.", "parameters": {
        "type": "object", "properties": {"product_id": {"type": "string"}, "quantity": {"type": "integer"}}}}}

class Environment:
    def __init__(self, world):
        for product in world.get("products", []):
            ThreadSafeBase.known()[product] = product
        self.tools = SimpleNamespace(db=SimpleNamespace(orders={}))
    def get_policy(self):
        return "POLICY"
    def get_tools(self):
        return [Tool()]
    def make_tool_call(self, tool_name, requestor, product_id, quantity=1):
        known = ThreadSafeBase.known()[product_id]
        made = {"order_type": "delivery", "store_id": "S1", "status": "unpaid", "note": "", "products": [
            {"product_id": known, "store_id": "S1", "quantity": quantity}]}
        self.tools.db.orders[str(len(self.tools.db.orders))] = made
        return made

def get_environment(db=None, language=None):
    return Environment(db or {})

def get_tasks(language=None):
    return [Task.model_validate(task) for task in json.loads(Path(__file__).with_name(f"tasks_{language}.json").read_text())]
""".replace("POLICY", POLICY)

VITA_THREADS = """
import threading

class ThreadSafeBase:
    things = {}
    @classmethod
    def known(cls):
        return cls.things.setdefault(threading.get_ident(), {})
    @classmethod
    def clear_thread_data(cls):
        cls.things[threading.get_ident()] = {}
"""


@pytest.fixture
def vita(tmp_path):
    order = {
        "order_id": "T01",
        "order_type": "delivery",
        "store_id": "S1",
        "status": "paid",
        "products": [{"product_id": "soup", "quantity": 2}],
    }
    one = {
        "id": "7",
        "environment": {"time": "2025-06-21 11:20:00", "products": ["soup", "rice"]},
        "user_scenario": {"user_profile": {"occupation": "Doctor"}},
        "instructions": "You want two soups.",
        "evaluation_criteria": {
            "expected_states": [{"required_orders": [order], "state_rubrics": ["warm"]}],
            "overall_rubrics": ["warm", "fast"],
        },
    }
    other = {**one, "id": "8", "environment": {"products": ["tea"]}, "evaluation_criteria": None}
    empty = dict.fromkeys(("__init__", "data_model/__init__", "domains/__init__", "domains/delivery/__init__"), "")
    write(
        tmp_path,
        {f"src/vita/{name}.py": text for name, text in empty.items()}
        | {
            "src/vita/data_model/thread_safe_base.py": VITA_THREADS,
            "src/vita/domains/delivery/environment.py": VITA_CODE,
            "src/vita/domains/delivery/tasks_english.json": [one, other],
        },
    )
    return load_environment(f"{tmp_path}:delivery", "vitabench")


def test_vitabenchs_reward_is_that_the_required_orders_were_made(vita):
    def reward(*quantities, said=("Done.",) * 4):
        environment, _, _ = play(vita, "7", [("order", {"product_id": "soup", "quantity": n}) for n in quantities], said)
        return asyncio.run(environment.get_reward())

    assert [reward(2), reward(1), reward(), reward(2, 1)] == [1, 0, 0, 1]
    assert reward(2, said=["###STOP###"]) == 1, "the agent may end the conversation"
    assert vita.make_row("train", 0) == {"task": "7", "subset": "1 orders"}


def test_worlds_of_vitabench_that_live_at_the_same_time_know_nothing_of_each_other(vita):
    """It keeps its things by thread, and environment code is run by any thread."""
    first, second = vita(), vita()
    asyncio.run(first.reset(task="7"))
    asyncio.run(second.reset(task="8"))
    assert first.call_tool("order", {"product_id": "rice"})["products"][0]["product_id"] == "rice"
    with pytest.raises(KeyError):
        second.call_tool("order", {"product_id": "rice"})
    assert first.system_prompt == "Be kind. It is 2025-06-21 11:20:00."


def test_a_judge_is_given_every_rubric_once_and_what_was_said_and_called(vita):
    asked = []

    class Judged(vita):
        @staticmethod
        def judge(rubrics, messages):
            asked.append((rubrics, [m.get("content", m.get("tool_call")) for m in messages]))
            return True

    environment, _, _ = play(Judged, "7", [("order", {"product_id": "rice"})], ["Rice.", "###STOP###"])
    assert asyncio.run(environment.get_reward()) == 1
    assert asked == [(["warm", "fast"], ["order", "Rice.", "###STOP###"])]
