"""The adapters against checkouts whose folders OLDLOGITS_TAU2_BENCH and OLDLOGITS_VITABENCH name, with their requirements."""

import asyncio
import os

import pytest

from oldlogits.envs.base import load_environment
from oldlogits.envs.tau2.episode import actions_of
from oldlogits.envs.tools import tool_names

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of code that is not ours


def checkout(variable):
    """The folder that a variable names; without it the test is skipped."""
    return os.environ.get(variable) or pytest.skip(f"{variable} names no checkout")


@pytest.mark.parametrize("domain, num_tasks", [("airline", 50), ("retail", 114), ("telecom:small", 20)])
def test_every_gold_plan_of_tau2_bench_earns_its_reward(domain, num_tasks):
    name, _, split = domain.partition(":")
    made = load_environment(f"{checkout('OLDLOGITS_TAU2_BENCH')}:{name}:{split or 'base'}", "tau2")
    tasks = {made.make_row("heldout", i)["task"] for i in range(num_tasks)}
    assert len(tasks) == num_tasks
    assert {task: play(made, task) for task in tasks} == dict.fromkeys(tasks, 1)


def play(made, task):
    """Follow the gold plan of a task, say what is to be said until the customer has heard enough; the reward."""
    environment = made()
    heard = asyncio.run(environment.reset(task=task))
    for action in actions_of(made.domain.tasks[task]):
        try:
            environment.call_tool(action["name"], action["arguments"])
        except made.tool_errors:
            continue  # golds of some tasks hold a call that fails
    told = "Done. " + " ".join(made.domain.tasks[task]["evaluation_criteria"].get("communicate_info") or [])
    while heard is not None:
        heard = asyncio.run(environment.reply(told))
    return environment.get_reward()


@pytest.mark.parametrize("domain", ["delivery", "instore", "ota"])
def test_every_task_of_vitabench_has_tools_a_policy_and_no_reward_for_nothing(domain):
    made = load_environment(f"{checkout('OLDLOGITS_VITABENCH')}:{domain}", "vitabench")
    rewards = set()
    for task in list(made.domain.tasks)[:20]:
        environment = made()
        heard = asyncio.run(environment.reset(task=task))
        assert heard
        assert "{time}" not in environment.system_prompt
        while heard is not None:
            heard = asyncio.run(environment.reply("I cannot help you."))
        rewards.add(asyncio.run(environment.get_reward()))
    assert len(made.domain.tasks) == 100
    assert len(tool_names(made)) > 10
    assert rewards == {0.0}
