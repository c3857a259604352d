"""Groups and evaluations with an engine that answers when it is told to."""

import asyncio
from pathlib import Path
from types import SimpleNamespace

import pytest

from oldlogits.core.engine import Generation, Sampling, Span
from oldlogits.core.errors import RolloutError, WorkerDiedError
from oldlogits.core.trajectory import Context, Sampled
from oldlogits.envs.parsers.plain import PlainParser
from oldlogits.models.chat.format import ChatFormat
from oldlogits.rollout.buffer import Buffer
from oldlogits.rollout.environment_runner import run_inline
from oldlogits.rollout.groups import Rollouts
from oldlogits.rollout.heldout import evaluate
from oldlogits.rollout.journal.journal import Journal
from oldlogits.rollout.journal.progress import Progress
from oldlogits.rollout.journal.records import Admitted, Grew
from oldlogits.rollout.player import ClassPlayer
from oldlogits.rollout.staleness import StalenessBound
from oldlogits.rollout.turns import Agent, Failure, TurnLimits
from oldlogits.rollout.watches import WINDOW, FailureWatch, FilterWatch
from oldlogits.sources.none import NoSource
from order_desk.tiny import tiny_tokenizer

from ..builders import sampled
from ..waiting import HUNG_S

CHAT = ChatFormat(tiny_tokenizer(["hello"]))


class Task:
    """The reward is the member's turn to be created: 0, 1, 2, ...; a row may make it fail, always or the first times."""

    num_made = 0
    num_failed = 0

    def reset(self, *, fails=False, times=0, reward=None):
        if fails or Task.num_failed < times:
            Task.num_failed += 1
            raise RuntimeError("no shop")
        self.reward = Task.num_made if reward is None else reward
        Task.num_made += 1

    def get_reward(self):
        return float(self.reward)

    def look(self):
        """Look."""


class GatedEngine:
    """One end-of-turn token for each request, once `gate` is open; counts what runs at the same time."""

    def __init__(self):
        self.gate, self.version = asyncio.Event(), 0
        self.running, self.most_running, self.requests, self.temperatures, self.dead = 0, 0, [], set(), False

    async def generate(self, prompt_ids, sampling, request_id):
        self.requests.append(request_id)
        self.temperatures.add(sampling.temperature)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await self.gate.wait()
            await asyncio.sleep(0)
        finally:
            self.running -= 1
        if self.dead:
            raise WorkerDiedError("the engine is gone")
        span = Span(version=self.version, start=0, end=1)
        return Generation(output_ids=(CHAT.end_of_turn_id,), logprobs=(-0.5,), spans=(span,), finish_reason="stop")


class Events:
    def __init__(self):
        self.all = []

    def emit(self, event):
        self.all.append(event)

    def of(self, kind):
        return [event for event in self.all if event.kind is kind]


def agent_of(engine):
    limits = TurnLimits(max_turns=1, max_tokens_per_turn=4, max_tokens=40)
    sampling = Sampling(max_tokens=4)
    return Agent(engine=engine, chat=CHAT, parser=PlainParser(), limits=limits, sampling=sampling, run_environment=run_inline)


class WatchfulSource(NoSource):
    """Remembers what it was told."""

    def __init__(self):
        self.grown, self.arrived, self.dropped = {}, [], []

    def on_segment_closed(self, trajectory_id, segments):
        self.grown.setdefault(trajectory_id, []).append(len(segments))

    async def on_arrival(self, trajectories):
        self.arrived.append([t.id for t in trajectories])

    def drop(self, trajectory_ids):
        self.dropped += trajectory_ids


class World:
    """Rollouts with everything that they need, W = 1, B = 2, two members a group."""

    def __init__(
        self,
        tasks,
        *,
        rows=lambda index: {},
        max_running_groups=0,
        next_row=0,
        filter_uniform=False,
        max_replays=0,
        max_failed_share=0.5,
        max_filtered_batches=64,
        group_reward=None,
    ):
        Task.num_made = Task.num_failed = 0
        self.engine, self.events = GatedEngine(), Events()
        bound = StalenessBound(max_staleness=1, prompts_per_update=2)
        self.buffer = Buffer(bound, filter_uniform=filter_uniform)
        self.source, self.journal = WatchfulSource(), Journal(Path("unwritten"))
        self.rollouts = Rollouts(
            player=ClassPlayer(agent=agent_of(self.engine), environment_class=Task, group_reward=group_reward),
            rows=SimpleNamespace(train=rows),
            buffer=self.buffer,
            source=self.source,
            events=self.events,
            tasks=tasks,
            group_size=2,
            max_replays=max_replays,
            failures=FailureWatch(self.events, "training episodes", max_failed_share),
            left_out=FilterWatch(self.events, 2, max_filtered_batches),
            max_running_groups=max_running_groups,
            journal=self.journal,
            next_row=next_row,
            next_group=next_row,
        )

    async def admit(self, version=0, num_wanted=100):
        self.rollouts.admit(version, num_wanted=num_wanted, pace_s=0.0)
        await self.settle()

    async def settle(self, rounds=50):
        for _ in range(rounds):
            await asyncio.sleep(0)

    def admitted(self):
        return [event.group for event in self.events.of("group_admitted")]


def in_world(scenario, **settings):
    async def main():
        async with asyncio.TaskGroup() as tasks:
            world = World(tasks, **settings)
            await scenario(world)
            world.rollouts.stop()

    asyncio.run(asyncio.wait_for(main(), HUNG_S))


def test_as_many_groups_start_as_the_bound_admits_from_the_first_row_on():
    seen = []

    async def scenario(world):
        await world.admit(version=3)
        assert world.admitted() == ["g000005", "g000006", "g000007", "g000008"]
        assert seen == [5, 6, 7, 8]
        assert world.rollouts.next_row == 9
        assert sorted(world.engine.requests) == sorted(f"g00000{i}.{m}/0" for i in (5, 6, 7, 8) for m in (0, 1))
        assert {event.version for event in world.events.all} == {3}

    in_world(scenario, rows=lambda index: seen.append(index) or {}, next_row=5)


@pytest.mark.parametrize("num_wanted", [0, 1, 3])
def test_no_more_groups_start_than_the_run_still_trains(num_wanted):
    async def scenario(world):
        await world.admit(num_wanted=num_wanted)
        assert len(world.admitted()) == num_wanted
        world.engine.gate.set()
        await world.settle()
        assert len(world.admitted()) == num_wanted

    in_world(scenario)


def test_a_group_reward_replaces_the_rewards_of_a_group_and_is_given_row_and_messages():
    asked = []

    def graded(*, row, messages, rewards):
        asked.append((row, len(messages), [m[0]["role"] for m in messages], list(rewards)))
        return [rewards[0] + 1, rewards[0] - 1]

    async def scenario(world):
        world.engine.gate.set()
        await world.admit(num_wanted=1)
        assert [event.rewards for event in world.events.of("group_closed")] == [[3.0, 1.0]]
        (entry,) = world.buffer._entries.values()
        assert [t.reward for t in entry.group.trajectories] == [3.0, 1.0]
        assert asked == [({"reward": 2.0}, 2, ["assistant"] * 2, [2.0, 2.0])]
        kept = world.journal.progress.groups["g000000"].episodes
        assert [kept[f"g000000.{m}"].ended.reward for m in (0, 1)] == [2.0, 2.0], "their own, of which it is made again"
        assert all(kept[f"g000000.{m}"].ended.messages for m in (0, 1))

    in_world(scenario, rows=lambda index: {"reward": 2.0}, group_reward=graded)


@pytest.mark.parametrize(("max_replays", "num"), [(0, 1), (1, 2)])
def test_a_group_reward_is_given_the_episodes_that_were_played_and_no_failed_one(max_replays, num):
    asked = []

    def graded(*, row, messages, rewards):
        asked.append((len(messages), list(rewards)))
        return [reward + 10 for reward in rewards]

    async def scenario(world):
        world.engine.gate.set()
        await world.admit(num_wanted=1)
        assert asked[0] == (num, [2.0] * num)
        closed = world.events.of("group_closed")[0]
        assert (closed.rewards, closed.num_failed) == ([12.0] * num, 2 - num)
        assert closed.filtered == (num < 2), "one episode is compared with nothing"
        world.buffer.check()

    settings = {"max_replays": max_replays, "max_failed_share": 1.0, "group_reward": graded}
    in_world(scenario, rows=lambda index: {"reward": 2.0, "times": 1}, **settings)


def test_a_group_whose_episodes_all_failed_is_not_graded():
    def graded(*, row, messages, rewards):
        raise AssertionError("there is nothing to grade")

    async def scenario(world):
        world.engine.gate.set()
        await world.admit(num_wanted=1)
        assert all(event.reason == "reset: RuntimeError: no shop" for event in world.events.of("trajectory_failed"))
        world.buffer.check()

    in_world(scenario, rows=lambda index: {"fails": True}, max_failed_share=1.0, group_reward=graded)


@pytest.mark.parametrize("given", [[1.0], ["high", 1.0], None, [float("nan"), 0.0]])
def test_a_group_reward_that_gives_no_numbers_fails_all_episodes_of_its_group_with_the_reason(given):
    async def scenario(world):
        world.engine.gate.set()
        await world.admit(num_wanted=1)
        failed = world.events.of("trajectory_failed")
        assert [event.trajectory for event in failed[:2]] == ["g000000.0", "g000000.1"], "and so on: nothing is trained"
        assert all("the group reward" in event.reason for event in failed)
        assert (world.buffer.account.failed, world.buffer.account.filtered, world.buffer.queued) == (len(failed), 0, 0)
        world.buffer.check()

    in_world(scenario, rows=lambda index: {}, group_reward=lambda *, row, messages, rewards: given, max_failed_share=1.0)


def progress_of(*records):
    progress = Progress()
    for record in records:
        assert progress.apply(record)
    return progress


def test_a_group_that_a_run_goes_on_with_samples_nothing_before_the_version_that_admitted_it():
    """Else its tokens are older than the version that the buffer keeps for it, and the store lets go of theirs."""

    async def scenario(world):
        world.journal.progress = progress_of(
            Admitted(group="g000000", row=0, version=0, size=2), Admitted(group="g000001", row=1, version=2, size=2)
        )
        world.engine.gate.set()
        world.rollouts.go_on(0, 0)
        for version in range(2):
            world.engine.version = version
            await world.admit(version, num_wanted=0)
            assert [event.group for event in world.events.of("group_closed")] == ["g000000"]
        world.engine.version = 2
        await world.admit(2, num_wanted=0)
        assert [(e.group, e.oldest_version) for e in world.events.of("group_closed")] == [("g000000", 0), ("g000001", 2)]

    in_world(scenario)


def test_versions_of_episodes_that_wait_are_needed_until_the_source_knows_them():
    async def scenario(world):
        prompt = tuple(CHAT.prompt_ids("hello"))
        sampled = [Sampled(token_ids=(7,), logp_mu=(-0.5,), version=v, kv="fresh", temperature=1.0) for v in (0, 2)]
        world.journal.progress = progress_of(
            Admitted(group="g000000", row=0, version=0, size=2),
            Grew(episode="g000000.0", start=0, segments=(Context(token_ids=prompt), *sampled)),
        )
        world.rollouts.go_on(0, 0)
        await world.admit(1, num_wanted=0)
        assert world.rollouts.oldest_untaken == 0
        await world.admit(2, num_wanted=0)
        assert world.rollouts.oldest_untaken is None

    in_world(scenario)


def test_a_limit_on_running_groups_starts_the_next_when_one_ends():
    async def scenario(world):
        await world.admit()
        assert len(world.admitted()) == 1
        world.engine.gate.set()
        await world.settle()
        assert len(world.admitted()) == 4
        assert world.engine.most_running == 2

    in_world(scenario, max_running_groups=1)


def test_groups_that_ended_keep_their_room_until_they_are_trained():
    async def scenario(world):
        world.engine.gate.set()
        await world.admit()
        assert len(world.admitted()) == 4
        groups = await world.buffer.take(0)
        assert [group.id for group in groups] == ["g000000", "g000001"]
        await world.settle()
        assert len(world.admitted()) == 4
        world.buffer.confirm_trained()
        await world.admit(version=1)
        assert world.admitted()[4:] == ["g000004", "g000005"]
        world.buffer.check()

    in_world(scenario)


def test_a_closed_group_tells_rewards_oldest_version_and_failures():
    async def scenario(world):
        world.engine.version = 2
        world.engine.gate.set()
        await world.admit(version=2, num_wanted=1)
        (closed,) = world.events.of("group_closed")
        assert (closed.group, closed.rewards, closed.oldest_version) == ("g000000", [0.0, 1.0], 2)
        assert (closed.num_failed, closed.filtered) == (0, False)

    in_world(scenario)


def test_a_group_that_fails_is_counted_told_and_replaced():
    async def scenario(world):
        world.engine.gate.set()
        await world.admit(num_wanted=2)
        assert world.admitted() == ["g000000", "g000001", "g000002"]
        account = world.buffer.account
        assert (account.submitted, account.failed, account.filtered, world.buffer.queued) == (6, 2, 0, 4)
        failed = world.events.of("trajectory_failed")
        assert [(event.trajectory, event.reason) for event in failed] == [
            ("g000000.0", "reset: RuntimeError: no shop"),
            ("g000000.1", "reset: RuntimeError: no shop"),
        ]
        assert {group.id for group in await world.buffer.take(0)} == {"g000001", "g000002"}
        world.buffer.check()

    in_world(scenario, rows=lambda index: {"fails": index == 0})


def test_every_episode_that_ends_well_has_a_time_after_its_last_turn_and_none_is_remembered_for_ever():
    async def scenario(world):
        world.engine.gate.set()
        await world.admit(num_wanted=2)  # the first group fails and is replaced
        found = world.rollouts.latency.metrics()
        assert (found["turn/num_first"], found["turn/num_last"]) == (4, 4)
        assert found["turn/last_max_s"] >= found["turn/last_p50_s"] >= 0
        assert world.rollouts.latency.num_running == 0

    in_world(scenario, rows=lambda index: {"fails": index == 0})


def test_uniform_groups_are_filtered_told_and_replaced():
    async def scenario(world):
        world.engine.gate.set()
        await world.admit(num_wanted=2)
        closed = {event.group: event.filtered for event in world.events.of("group_closed")}
        assert closed == {"g000000": True, "g000001": False, "g000002": False}
        assert world.buffer.account.filtered == 2

    in_world(scenario, rows=lambda index: {"reward": 1.0} if index == 0 else {}, filter_uniform=True)


def test_the_source_is_told_of_growth_of_groups_that_wait_for_training_and_of_those_that_never_will():
    async def scenario(world):
        world.engine.gate.set()
        await world.admit(num_wanted=2)
        source = world.source
        assert source.arrived == [["g000002.0", "g000002.1"], ["g000003.0", "g000003.1"]]
        assert sorted(source.dropped) == ["g000000.0", "g000000.1", "g000001.0", "g000001.1"], "failed, filtered"
        assert {name: source.grown.get(name) for name in source.dropped[:2]} == {"g000000.0": None, "g000000.1": None}
        assert source.grown["g000002.0"] == [1, 2], "the prompt, then the turn"

    def rows(index):
        return {0: {"fails": True}, 1: {"reward": 1.0}}.get(index, {})

    in_world(scenario, rows=rows, filter_uniform=True)


def test_what_is_cancelled_is_told_to_the_source():
    worlds = []

    async def scenario(world):
        worlds.append(world)
        await world.admit(num_wanted=1)

    in_world(scenario)
    assert sorted(worlds[0].source.dropped) == ["g000000.0", "g000000.1"]


def test_stopping_cancels_what_runs_and_every_trajectory_stays_accounted_for():
    worlds = []

    async def scenario(world):
        worlds.append(world)
        await world.admit()

    in_world(scenario)
    (world,) = worlds
    assert world.engine.running == 0
    world.buffer.check()
    world.buffer.cancel_all()
    world.buffer.check()
    assert world.buffer.account.cancelled == world.buffer.account.submitted == 8


async def play_on(world):
    world.engine.gate.set()
    await world.admit()
    await world.settle(rounds=1000)


def errors_of(scenario, **settings):
    """The errors that ended a run, out of their groups."""
    with pytest.raises(ExceptionGroup) as caught:
        in_world(scenario, **settings)

    def leaves(group):
        return [leaf for e in group.exceptions for leaf in (leaves(e) if isinstance(e, ExceptionGroup) else [e])]

    return leaves(caught.value)


def test_an_environment_that_fails_too_often_ends_the_run_with_figures_and_the_last_reason():
    worlds = []

    async def scenario(world):
        worlds.append(world)
        await play_on(world)

    errors = errors_of(scenario, rows=lambda index: {"fails": True})
    assert {type(error) for error in errors} == {RolloutError}
    assert (
        errors[0].what == f"{WINDOW // 2 + 1} of the last {WINDOW // 2 + 1} training episodes were ended by their environment"
    )
    assert errors[0].got == "the last: reset: RuntimeError: no shop"
    assert errors[0].allowed == f"at most 50% of {WINDOW} (rollout.max_failed_share)"
    warned = worlds[0].events.of("warning")
    assert [(w.name, w.figures) for w in warned if w.name == "failed-episodes"] == [
        ("failed-episodes", {"failed": 4, "ended": 4})
    ]


@pytest.mark.slow
def test_failures_up_to_the_share_that_the_recipe_names_do_not_end_the_run():
    async def scenario(world):
        world.engine.gate.set()
        await world.admit(num_wanted=4)
        for version in range(WINDOW // 2):
            await world.buffer.take(version)
            world.rollouts.batch_taken()
            world.buffer.confirm_trained()
            world.engine.version = version + 1
            await world.admit(version=version + 1, num_wanted=4)
        assert world.buffer.account.failed > WINDOW

    in_world(scenario, rows=lambda index: {"fails": index % 2 == 0}, max_failed_share=0.6)


def test_a_failed_episode_is_played_again_in_its_group_and_every_one_is_accounted_for():
    async def scenario(world):
        world.engine.gate.set()
        await world.admit(num_wanted=1)
        (closed,) = world.events.of("group_closed")
        assert (len(closed.rewards), closed.num_failed, closed.filtered) == (2, 0, False)
        assert [e.trajectory for e in world.events.of("trajectory_failed")] == ["g000000.0", "g000000.0r1"]
        account = world.buffer.account
        assert (account.submitted, account.failed, world.buffer.queued) == (4, 2, 2)
        assert world.source.arrived == [["g000000.0r2", "g000000.1"]]
        world.buffer.check()

    in_world(scenario, rows=lambda index: {"times": 2}, max_replays=2)


def test_a_row_that_always_fails_is_played_again_only_so_often():
    async def scenario(world):
        world.engine.gate.set()
        await world.admit(num_wanted=1)
        assert world.admitted() == ["g000000", "g000001"]
        assert (world.buffer.account.submitted, world.buffer.account.failed) == (2 * 3 + 2, 2 * 3)
        assert world.events.of("group_closed")[0].num_failed == 2
        world.buffer.check()

    in_world(scenario, rows=lambda index: {"fails": index == 0}, max_replays=2)


def test_groups_that_are_left_out_without_end_are_warned_of_and_end_the_run_with_figures():
    worlds = []

    async def scenario(world):
        worlds.append(world)
        await play_on(world)

    errors = errors_of(scenario, rows=lambda index: {"reward": 1.0}, filter_uniform=True, max_filtered_batches=16)
    assert {type(error) for error in errors} == {RolloutError}
    assert errors[0].what == (
        "since the last update 32 of 32 groups were left out: 32 with equal rewards, 0 with too many failed episodes"
    )
    (warned,) = worlds[0].events.of("warning")
    assert (warned.name, warned.figures) == ("filtered-groups", {"uniform": 4, "failed": 0, "kept": 0})
    assert warned.message.endswith("the run stops at 32")


def test_groups_that_are_left_out_between_updates_do_not_end_the_run():
    async def scenario(world):
        world.engine.gate.set()
        await world.admit(num_wanted=4)
        for version in range(20):
            await world.buffer.take(version)
            world.rollouts.batch_taken()
            world.buffer.confirm_trained()
            world.engine.version = version + 1
            await world.admit(version=version + 1, num_wanted=4)
        assert world.buffer.account.filtered > 2 * 32

    rewards = lambda index: {"reward": 1.0} if index % 3 else {}  # noqa: E731
    in_world(scenario, rows=rewards, filter_uniform=True, max_filtered_batches=8)


@pytest.mark.parametrize("num_failed, warned", [(3, False), (4, True)])
def test_a_few_failures_at_the_start_are_no_share(num_failed, warned):
    events = Events()
    watch = FailureWatch(events, "episodes", 0.5)
    for _ in range(num_failed):
        watch.count(Failure(id="a", group_id="g", reason="r"), 0)
    assert bool(events.of("warning")) is warned


def test_an_engine_that_dies_ends_the_run():
    async def scenario(world):
        world.engine.dead = True
        await play_on(world)

    assert {str(error) for error in errors_of(scenario)} == {"the engine is gone"}


def evaluate_rows(rows, *, num_running, temperature=1.0, engine_class=GatedEngine):
    engine, told = None, []
    Task.num_made = Task.num_failed = 0

    async def main():
        nonlocal engine
        engine = engine_class()
        engine.gate.set()
        return await evaluate(
            ClassPlayer(agent=agent_of(engine), environment_class=Task).evaluating(temperature),
            rows,
            name="ebefore",
            num_running=num_running,
            tell=told.append,
        )

    return asyncio.run(main()), engine, told


@pytest.mark.parametrize("num_running", [1, 3, 100])
def test_an_evaluation_plays_every_row_once_and_keeps_their_order(num_running):
    rows = [{"reward": i / 10} for i in range(10)]
    found, engine, told = evaluate_rows(rows, num_running=num_running)
    assert found.rewards == tuple(i / 10 for i in range(10))
    assert [branches[0].id for branches in found.episodes] == [f"ebefore.{i}" for i in range(10)]
    assert engine.most_running == min(num_running, 10)
    assert sorted(one[0].id for one in told) == [f"ebefore.{i}" for i in range(10)]


def test_an_episode_that_fails_has_no_reward_in_its_place_and_is_told():
    found, _, told = evaluate_rows([{"reward": 1.0}, {"fails": True}, {"reward": 2.0}, {"reward": 0.99}], num_running=2)
    assert found.rewards == (1.0, None, 2.0, 0.99)
    assert found.num_successes == 2
    assert [branches[0].id for branches in found.episodes] == ["ebefore.0", "ebefore.2", "ebefore.3"]
    assert [one.reason for one in told if isinstance(one, Failure)] == ["reset: RuntimeError: no shop"]


def test_rows_whose_task_was_cancelled_from_inside_are_named_as_not_played():
    class Leaking(GatedEngine):
        async def generate(self, prompt_ids, sampling, request_id):
            if request_id == "ebefore.1/0":
                raise asyncio.CancelledError
            return await super().generate(prompt_ids, sampling, request_id)

    found, _, told = evaluate_rows([{"reward": 1.0}] * 4, num_running=1, engine_class=Leaking)
    assert found.rewards == (1.0, None, None, None), "one task played all rows"
    assert [one[0].id if isinstance(one, tuple) else one.id for one in told] == [f"ebefore.{i}" for i in range(4)]
    assert told[3].reason == "not played: its task was cancelled"


def test_an_evaluation_samples_at_its_own_temperature():
    _, engine, _ = evaluate_rows([{}], num_running=1, temperature=0.0)
    assert engine.temperatures == {0.0}


def test_an_evaluation_of_nothing_is_empty():
    found, _, told = evaluate_rows([], num_running=4)
    assert (found.rewards, found.episodes, found.num_successes, told) == ((), (), 0, [])


def test_the_tokens_of_a_turn_that_goes_on_are_all_known_when_the_run_is_ended_again():
    """The engine tells what it has sampled since the turn went on; what the turn had before is known as well."""
    first, second = sampled([5, 6], 0), sampled([7], 0)

    async def scenario(world):
        journal, id = world.rollouts._journal, "g000000.0"
        opening = Context(token_ids=tuple(CHAT.prompt_ids("")))
        journal.note(Admitted(group="g000000", row=0, version=0, size=1))
        journal.grew(id, [opening])
        journal.running({id: [first]})
        world.rollouts.go_on(0, 0)
        await world.admit(0, num_wanted=0)
        assert world.engine.requests == [f"{id}/0"]
        journal.running({id: [second]})
        assert journal.progress.groups["g000000"].episodes[id].known == (opening, first, second)

    in_world(scenario)
