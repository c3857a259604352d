"""Groups of a run that was ended and goes on, whatever they had come to, and whatever becomes of the run then."""

import asyncio
import random
from collections import Counter
from dataclasses import asdict
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oldlogits.core.engine import Generation, Sampling, Span
from oldlogits.envs.parsers.plain import PlainParser
from oldlogits.rollout.buffer import Buffer, TrajectoryCounts
from oldlogits.rollout.environment_runner import run_inline
from oldlogits.rollout.groups import Rollouts
from oldlogits.rollout.journal.journal import Journal
from oldlogits.rollout.journal.progress import Progress
from oldlogits.rollout.journal.records import Admitted, Ended, Failed, Taken
from oldlogits.rollout.player import ClassPlayer
from oldlogits.rollout.staleness import StalenessBound
from oldlogits.rollout.turns import Agent, TurnLimits
from oldlogits.rollout.watches import FailureWatch, FilterWatch

from ..builders import sampled
from ..waiting import HUNG_S
from .test_groups import CHAT, Events, WatchfulSource

TURNS = 3
END = CHAT.end_of_turn_id


class Chance:
    """Fails by chance, and rewards by chance; the dice are the test's."""

    dice = random.Random(0)
    fails = 0.0

    def reset(self):
        self.turns = 0

    def reply(self, message):
        if self.dice.random() < self.fails:
            raise RuntimeError("no shop")
        self.turns += 1
        return "hello" if self.turns < TURNS else None

    def get_reward(self):
        return float(self.dice.random() < 0.5)


class ChanceEngine:
    """One end-of-turn token of its version for each request, some time later."""

    def __init__(self, dice):
        self.version, self.dice, self.is_open, self.requests = 0, dice, True, []

    async def generate(self, prompt_ids, sampling, request_id):
        self.requests.append((request_id, tuple(prompt_ids)))
        await asyncio.sleep(0)
        while not self.is_open or self.dice.random() < 0.7:
            await asyncio.sleep(0)
        span = Span(version=self.version, start=0, end=1)
        return Generation(output_ids=(END,), logprobs=(-0.5,), spans=(span,), finish_reason="stop")


class Life:
    """A run from a checkpoint or the beginning to a kill or the end: rollouts and buffer, and the loop's order of calls."""

    def __init__(
        self, tasks, folder, *, window, batch, dice, fails=0.0, filter_uniform=False, max_replays=0, progress=None, goes_on=True
    ):
        Chance.dice, Chance.fails = dice, fails
        self.engine, self.events, self.source = ChanceEngine(dice), Events(), WatchfulSource()
        self.journal = Journal(folder, progress)
        self.batch, self.staleness, self.trained = batch, [], []
        self.buffer = Buffer(StalenessBound(max_staleness=window, prompts_per_update=batch), filter_uniform=filter_uniform)
        self.version = 0
        self.goes_on = goes_on
        self.settings = {"tasks": tasks, "max_replays": max_replays}

    def begin(self, version=0, account=None, next_group=0):
        since = self.journal.progress
        self.version = self.engine.version = version
        if account is not None:
            self.buffer.account = TrajectoryCounts(**account)
            self.buffer.account.submitted += since.num_submitted
            self.buffer.account.failed += since.num_failed
            self.buffer.account.filtered += since.num_filtered
        limits = TurnLimits(max_turns=TURNS + 1, max_tokens_per_turn=4, max_tokens=80)
        self.rollouts = Rollouts(
            player=ClassPlayer(
                agent=Agent(
                    engine=self.engine,
                    chat=CHAT,
                    parser=PlainParser(),
                    limits=limits,
                    sampling=Sampling(max_tokens=4),
                    run_environment=run_inline,
                ),
                environment_class=Chance,
                goes_on=self.goes_on,
            ),
            rows=SimpleNamespace(train=lambda index: {}),
            buffer=self.buffer,
            source=self.source,
            events=self.events,
            group_size=2,
            failures=FailureWatch(self.events, "training episodes", 1.0),
            left_out=FilterWatch(self.events, 2, 10_000),
            max_running_groups=0,
            journal=self.journal,
            next_row=max(next_group, since.next_row),
            next_group=max(next_group, since.next_group),
            **self.settings,
        )
        self.rollouts.go_on(version, 0)
        self.rollouts.admit(version, num_wanted=1000, pace_s=0.0)
        self.buffer.check()

    async def update(self, makes_another=False):
        groups = await self.buffer.take(self.version, self.journal.progress.taken.get(self.version, ()))
        self.rollouts.batch_taken()
        self.buffer.check()
        self.staleness += [self.version - group.oldest_version for group in groups]
        self.trained += [t.id for group in groups for t in group.trajectories]
        self.journal.note(Taken(version=self.version, groups=tuple(group.id for group in groups)))
        await asyncio.sleep(0)
        self.version += 1
        if makes_another:
            self.rollouts.begin_again_from(self.version)
        self.engine.version = self.version
        self.buffer.confirm_trained()
        self.journal.progress.forget(group.id for group in groups)
        self.buffer.check()
        self.rollouts.admit(self.version, num_wanted=1000, pace_s=0.0)
        self.buffer.check()


class Kept:
    """A journal's records after its last checkpoint, as they were written."""

    def __init__(self, journal):
        self.journal, self.after, self.at = journal, [], []
        note = journal.note

        def noted(record):
            self.after.append(record)
            note(record)

        journal.note = noted

    def checkpoint(self, version):
        _, records = self.journal.begin(version)
        self.at, self.after = list(records), []


def progress_of(checkpoint, after):
    progress = Progress()
    for record in checkpoint:
        progress.apply(record)
    progress = Progress(groups=progress.groups, taken=progress.taken, probes=progress.probes)
    for record in after:
        progress.apply(record)
    return progress


@pytest.mark.slow
@given(
    seed=st.integers(0, 2**32),
    window=st.integers(0, 3),
    batch=st.integers(1, 3),
    later_window=st.integers(0, 3),
    later_batch=st.integers(1, 3),
    is_changed=st.booleans(),
    at=st.integers(0, 3),
    num_after=st.integers(0, 3),
    other_at=st.integers(0, 5),
    fails=st.sampled_from([0.0, 0.2]),
    filters=st.tuples(st.booleans(), st.booleans()),
    replays=st.tuples(st.integers(0, 2), st.integers(0, 2)),
)
def test_whatever_was_in_flight_a_run_goes_on_within_its_bound_and_accounts_for_every_trajectory(
    seed,
    window,
    batch,
    later_window,
    later_batch,
    is_changed,
    at,
    num_after,
    other_at,
    fails,
    filters,
    replays,
    tmp_path_factory,
):
    dice, folder = random.Random(seed), tmp_path_factory.mktemp("life")

    async def first():
        async with asyncio.TaskGroup() as tasks:
            options = {"fails": fails, "filter_uniform": filters[0], "max_replays": replays[0]}
            life = Life(tasks, folder / "a", window=window, batch=batch, dice=dice, **options)
            kept = Kept(life.journal)
            life.begin()
            for _ in range(at):
                await life.update()
            kept.checkpoint(life.version)
            account, num_trained = asdict(life.buffer.account), len(life.trained)
            next_group = life.rollouts.next_group
            for _ in range(num_after):
                await life.update()
            for _ in range(dice.randrange(40)):
                await asyncio.sleep(0)
            after = kept.after[: len(kept.after) - dice.choice([0, 0, 1, 5])]  # what the kill kept from the disk is a tail
            life.rollouts.stop()
        return kept.at, after, account, life.trained[:num_trained], next_group

    async def second(checkpoint, after, account, trained, next_group):
        progress = progress_of(checkpoint, after)
        async with asyncio.TaskGroup() as tasks:
            options = {"fails": fails, "filter_uniform": filters[1], "max_replays": replays[1]}
            bound = {"window": later_window, "batch": later_batch} if is_changed else {"window": window, "batch": batch}
            life = Life(tasks, folder / "b", dice=dice, progress=progress, **bound, **options)
            life.begin(at, account, next_group)
            for number in range(7):
                await life.update(makes_another=number == other_at)
            assert max(life.staleness) <= bound["window"]
            assert max(Counter(trained + life.trained).values()) == 1, "nothing is trained twice"
            life.rollouts.stop()
        life.buffer.cancel_all()
        life.buffer.check()

    asyncio.run(asyncio.wait_for(second(*asyncio.run(asyncio.wait_for(first(), HUNG_S))), 20))


async def settle():
    for _ in range(60):
        await asyncio.sleep(0)


def lives(folder, first, second, *, version=0, **options):
    """Play a life whose engine does not answer, end it after `first`, and play one that goes on with its journal."""

    async def main():
        progress = None
        for name, scenario in (("a", first), ("b", second)):
            async with asyncio.TaskGroup() as tasks:
                life = Life(tasks, folder / name, window=1, batch=1, dice=random.Random(0), progress=progress, **options)
                life.engine.is_open = False
                life.begin(version, None if progress is None else {})
                await settle()
                await scenario(life)
                life.rollouts.stop()
            progress = progress_of([], list(life.journal.progress.records()))

    asyncio.run(asyncio.wait_for(main(), HUNG_S))


def test_a_half_turn_that_goes_on_is_kept_when_the_run_is_ended_again(tmp_path):
    half, more = [sampled([5], 0), sampled([6], 0)], [sampled([7], 0)]
    one = sampled([5, 6], 0)

    async def first(life):
        life.journal.running({"g000000.0": half})

    async def second(life):
        prompt = life.journal.progress.groups["g000000"].episodes["g000000.0"].segments[0]
        asked = dict(life.engine.requests)
        assert asked["g000000.0/0"] == (*prompt.token_ids, 5, 6)
        assert asked["g000000.1/0"] == prompt.token_ids
        life.journal.running({"g000000.0": [], "g000000.1": []})
        assert life.journal.progress.groups["g000000"].episodes["g000000.0"].known == (prompt, one)
        life.journal.running({"g000000.0": more})
        assert life.journal.progress.groups["g000000"].episodes["g000000.0"].known == (prompt, one, *more)
        again = progress_of([], list(life.journal.progress.records()))
        assert again.groups["g000000"].episodes["g000000.0"].known == (prompt, one, *more)

    lives(tmp_path, first, second)


def test_an_agent_program_that_begins_again_has_lost_the_tokens_of_its_answers_and_nothing_else_of_it_is_kept(tmp_path):
    async def first(life):
        life.engine.is_open = True
        while not any(id.startswith("g000000.0/1") for id, _ in life.engine.requests):  # its first turn was answered
            await asyncio.sleep(0)
        life.engine.is_open = False
        await settle()
        life.journal.running({"g000000.0": [sampled([5, 6], 0)]})  # its client leaves
        known = life.journal.progress.groups["g000000"].episodes["g000000.0"]
        assert (known.known, known.num_sampled) == ((), known.num_answered)
        now = {
            id: episode.num_answered
            for group in life.journal.progress.groups.values()
            for id, episode in group.episodes.items()
            if episode.ended is None
        }
        answered.append(now)

    async def second(life):
        lost = {e.trajectory: e.num_lost_tokens for e in life.events.of("trajectory_restarted")}
        assert lost == answered[0]
        assert lost["g000000.0"] >= 1

    answered = []
    lives(tmp_path, first, second, goes_on=False)


def test_no_member_of_a_group_starts_before_the_run_is_at_the_version_that_admitted_it(tmp_path):
    async def first(life):
        life.journal.note(Admitted(group="g000007", row=7, version=2, size=2))

    async def second(life):
        assert not any(id.startswith("g000007") for id, _ in life.engine.requests)
        assert life.buffer.num_outstanding == 2
        assert life.buffer.running == 6, "those that wait are accounted for"
        life.engine.is_open = True
        for _ in range(2):
            await life.update()
        await settle()
        asked = [id for id, _ in life.engine.requests]
        assert "g000007.0/0" in asked
        assert not any(id.startswith("g000008") and asked.index(id) < asked.index("g000007.0/0") for id in asked)

    lives(tmp_path, first, second)


def test_tokens_of_a_version_that_is_another_one_now_begin_again_at_once_and_are_counted(tmp_path):
    async def first(life):
        life.journal.note(Admitted(group="g000007", row=7, version=1, size=2))
        prompt = life.journal.progress.groups["g000000"].episodes["g000000.0"].segments[0]
        for id, version in (("g000000.0", 0), ("g000000.1", 1), ("g000007.0", 1), ("g000007.1", 2)):
            life.journal.grew(id, [prompt, sampled([5, END], version)])

    async def second(life):
        life.rollouts.begin_again_from(2)
        assert [e.trajectory for e in life.events.of("trajectory_restarted")] == ["g000007.1"]
        life.rollouts.begin_again_from(1)
        lost = {e.trajectory: e.num_lost_tokens for e in life.events.of("trajectory_restarted")}
        assert lost == {"g000007.1": 2, "g000000.1": 2, "g000007.0": 2}
        known = progress_of([], list(life.journal.progress.records()))
        assert {id for group in known.groups.values() for id in group.episodes} == {"g000000.0", "g000001.0", "g000001.1"}

    lives(tmp_path, first, second)


def test_a_replay_that_was_promised_is_played_whatever_the_recipe_allows_now(tmp_path):
    async def first(life):
        life.journal.note(Failed(episode="g000000.0", again=True, version=0, reason="no"))

    async def second(life):
        assert life.buffer.account == TrajectoryCounts(submitted=2 * 2 + 1, failed=1)
        life.buffer.check()
        assert "g000000.0r1/0" in [id for id, _ in life.engine.requests]

    lives(tmp_path, first, second)


def test_a_batch_that_cannot_be_trained_again_is_not_waited_for(tmp_path):
    async def first(life):
        prompt = life.journal.progress.groups["g000000"].episodes["g000000.0"].segments[0]
        for id in ("g000000.0", "g000000.1"):
            life.journal.grew(id, [prompt, sampled([END], 0)])
            life.journal.note(Ended(episode=id, reward=0.5, stop_reason="done"))
        life.journal.note(Taken(version=0, groups=("g000000",)))

    async def second(life):
        life.engine.is_open = True
        await life.update()
        assert life.trained
        assert not any(id.startswith("g000000") for id in life.trained), "it is left out by the recipe of today"

    lives(tmp_path, first, second, filter_uniform=True)
