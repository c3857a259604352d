import asyncio
import itertools
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from oldlogits.core.errors import AccountingError
from oldlogits.rollout.buffer import Buffer
from oldlogits.rollout.staleness import StalenessBound

from ..builders import sampled, trajectory
from ..waiting import HUNG_S
from .test_staleness import schedule_exists


def member(group, index, *, first=0, last=0, reward=0.0):
    """A trajectory that began at version `first` and ended at `last`."""
    segments = [s for version in sorted({first, last}) for s in ([1], sampled([2], version))]
    return trajectory(*segments, id=f"{group}.{index}", group=group, reward=reward)


class BufferMachine(RuleBasedStateMachine):
    """A run in any order of events: admission, ends and failures in any order, filters, batches, publications."""

    @initialize(
        window=st.integers(0, 3),
        batch_size=st.integers(1, 2),
        size=st.integers(2, 3),
        min_size=st.integers(2, 3),
        filter_uniform=st.booleans(),
    )
    def start(self, window, batch_size, size, min_size, filter_uniform):
        self.min_size = min(size, min_size)
        self.loop = asyncio.new_event_loop()
        self.window, self.batch_size, self.size, self.filter_uniform = window, batch_size, size, filter_uniform
        bound = StalenessBound(max_staleness=window, prompts_per_update=batch_size)
        self.buffer = Buffer(bound, filter_uniform=filter_uniform, min_size=self.min_size)
        self.version, self.next, self.in_training = 0, 0, []
        self.admitted = {}  # group -> version, as long as it is outstanding
        self.running = {}  # group -> indices of running members
        self.ended = {}  # group -> rewards by index
        self.became = Counter()

    @rule(num=st.integers(1, 5))
    def admit(self, num):
        for _ in range(min(num, self.buffer.num_admissible())):
            name, self.next = f"g{self.next}", self.next + 1
            self.buffer.admit(name, size=self.size, version=self.version)
            self.admitted[name], self.running[name], self.ended[name] = self.version, set(range(self.size)), {}
            self.became["submitted"] += self.size

    @precondition(lambda self: any(self.running.values()))
    @rule(data=st.data(), reward=st.sampled_from([0.0, 1.0]), fails=st.sampled_from([False, False, True]))
    def end_one(self, data, reward, fails):
        name = data.draw(st.sampled_from([g for g, members in self.running.items() if members]))
        self.end(name, data.draw(st.sampled_from(sorted(self.running[name]))), None if fails else reward)

    @precondition(lambda self: any(self.running.values()))
    @rule(data=st.data())
    def play_one_again(self, data):
        name = data.draw(st.sampled_from([g for g, members in self.running.items() if members]))
        self.buffer.fail(name, again=True)
        self.became["failed"] += 1
        self.became["submitted"] += 1

    def end(self, name, index, reward):
        self.running[name].remove(index)
        if reward is None:
            self.buffer.fail(name)
            self.became["failed"] += 1
        else:
            first = self.admitted[name]
            self.buffer.end((member(name, index, first=first, last=self.version, reward=reward),))
            self.ended[name][index] = reward
        if not self.running[name]:
            self.close(name)

    def close(self, name):
        rewards = self.ended[name]
        expected = len(rewards) < self.min_size or (self.filter_uniform and len(set(rewards.values())) == 1)
        closed = self.buffer.close(name)
        assert (closed.group is None) is expected
        assert closed.num_failed == self.size - len(rewards)
        assert {int(t.id.rpartition(".")[2]): t.reward for t in closed.trajectories} == rewards
        if expected:
            self.became["filtered"] += len(rewards)
            del self.admitted[name], self.running[name], self.ended[name]

    @precondition(lambda self: not self.in_training)
    @rule()
    def take(self):
        async def attempt():
            task = asyncio.ensure_future(self.buffer.take(self.version))
            await asyncio.sleep(0)
            if task.done():
                return task.result()
            task.cancel()
            return None

        groups = self.loop.run_until_complete(attempt())
        ready = [name for name in self.admitted if not self.running[name]]
        assert (groups is not None) is self.is_safe(ready), "it waits exactly when it must"
        if groups is None:
            return
        assert len(groups) == self.batch_size
        for group in groups:
            assert group.id in ready
            assert {t.id for t in group.trajectories} == {f"{group.id}.{i}" for i in self.ended[group.id]}
            assert all(0 <= self.version - v <= self.window for t in group.trajectories for v in t.versions)
            del self.admitted[group.id], self.running[group.id], self.ended[group.id]
        self.in_training = groups

    def is_safe(self, ready):
        """Whether some batch of ready groups leaves a schedule for all others."""
        return any(
            schedule_exists(
                [v + self.window for name, v in self.admitted.items() if name not in batch], self.version + 1, self.batch_size
            )
            for batch in itertools.combinations(ready, self.batch_size)
        )

    @precondition(lambda self: self.in_training)
    @rule()
    def publish(self):
        self.buffer.confirm_trained()
        self.became["trained"] += sum(len(group.trajectories) for group in self.in_training)
        self.in_training, self.version = [], self.version + 1

    @rule()
    def let_everything_end(self):
        """No deadlock: with room filled and every episode ended well, the next batch is there."""
        if self.in_training:
            self.publish()
        self.admit(self.buffer.num_admissible())
        for name in list(self.running):
            for index in sorted(self.running[name]):
                self.end(name, index, float(index))
        if len(self.admitted) >= self.batch_size:
            self.take()
            assert self.in_training

    @invariant()
    def every_trajectory_is_accounted_for_once(self):
        if not hasattr(self, "buffer"):
            return
        self.buffer.check()
        account, now = self.buffer.account, Counter(self.became)
        for name in ("submitted", "trained", "filtered", "failed", "cancelled"):
            assert getattr(account, name) == now[name], name
        num_in_training = sum(len(group.trajectories) for group in self.in_training)
        assert self.buffer.running == sum(map(len, self.running.values()))
        assert self.buffer.queued == num_in_training + sum(map(len, self.ended.values()))
        ended = now["trained"] + now["filtered"] + now["failed"] + now["cancelled"]
        assert now["submitted"] == ended + self.buffer.queued + self.buffer.running

    @invariant()
    def the_window_is_never_overfilled_and_its_oldest_version_is_known(self):
        if not hasattr(self, "buffer"):
            return
        num_outstanding = len(self.admitted) + len(self.in_training)
        assert self.buffer.num_outstanding == num_outstanding <= (self.window + 1) * self.batch_size
        assert self.buffer.oldest_needed == min(self.admitted.values(), default=None)
        for place, name in enumerate(sorted(self.admitted, key=lambda g: (self.admitted[g], int(g[1:])))):
            assert self.buffer.rank(name) == len(self.in_training) + place

    def teardown(self):
        if hasattr(self, "buffer"):
            self.buffer.cancel_all()
            self.buffer.check()
            assert self.buffer.num_outstanding == self.buffer.queued == self.buffer.running == 0
            self.loop.close()


TestBuffer = BufferMachine.TestCase
TestBuffer.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


def buffer_of(window=1, batch_size=1, *, filter_uniform=False):
    return Buffer(StalenessBound(max_staleness=window, prompts_per_update=batch_size), filter_uniform=filter_uniform)


def fill(buffer, group, *rewards, version=0):
    buffer.admit(group, size=len(rewards), version=version)
    for index, reward in enumerate(rewards):
        buffer.end((member(group, index, first=version, last=version, reward=reward),))
    return buffer.close(group)


def test_admission_ends_at_the_capacity_and_refuses_an_id_twice():
    buffer = buffer_of(window=1, batch_size=1)
    buffer.admit("g0", size=2, version=0)
    with pytest.raises(AccountingError, match="group g0 cannot be admitted"):
        buffer.admit("g0", size=2, version=0)
    buffer.admit("g1", size=2, version=0)
    assert buffer.num_admissible() == 0
    with pytest.raises(AccountingError, match="fewer than 2"):
        buffer.admit("g2", size=2, version=0)


def test_room_is_made_when_the_batch_is_confirmed_not_when_it_is_taken():
    async def scenario():
        buffer = buffer_of(window=0)
        fill(buffer, "g0", 0.0, 1.0)
        (group,) = await buffer.take(0)
        assert group.id == "g0"
        assert (buffer.num_admissible(), buffer.queued) == (0, 2)
        buffer.confirm_trained()
        assert (buffer.num_admissible(), buffer.queued, buffer.account.trained) == (1, 0, 2)

    asyncio.run(scenario())


@pytest.mark.parametrize("event", ["close", "filter"])
def test_take_wakes_when_a_group_ends(event):
    async def scenario():
        buffer = buffer_of(window=0, filter_uniform=True)
        taking = asyncio.ensure_future(buffer.take(0))
        await asyncio.sleep(0)
        if event == "filter":
            assert fill(buffer, "g0", 1.0, 1.0).group is None
            await asyncio.sleep(0)
            assert not taking.done()
        fill(buffer, "g1", 0.0, 1.0)
        return [group.id for group in await asyncio.wait_for(taking, HUNG_S)]

    assert asyncio.run(scenario()) == ["g1"]


@pytest.mark.parametrize(
    "rewards, filter_uniform, filtered",
    [
        ((1.0, 1.0), True, True),
        ((1.0, 1.0), False, False),
        ((0.0, 1.0), True, False),
        ((1.0,), False, True),
        ((), False, True),
    ],
)
def test_uniform_groups_are_filtered_on_request_and_groups_of_less_than_two_always(rewards, filter_uniform, filtered):
    buffer = buffer_of(filter_uniform=filter_uniform)
    buffer.admit("g0", size=3, version=0)
    for index, reward in enumerate(rewards):
        buffer.end((member("g0", index, reward=reward),))
    for _ in range(3 - len(rewards)):
        buffer.fail("g0")
    closed = buffer.close("g0")
    assert (closed.group is None, closed.num_failed, len(closed.trajectories)) == (filtered, 3 - len(rewards), len(rewards))
    assert buffer.account.filtered == (len(rewards) if filtered else 0)
    buffer.check()


@pytest.mark.parametrize("min_size, rewards, why", [(3, (0.0, 1.0), "small"), (2, (0.0, 1.0), ""), (2, (1.0, 1.0), "uniform")])
def test_a_group_that_is_left_out_says_why(min_size, rewards, why):
    bound = StalenessBound(max_staleness=1, prompts_per_update=1)
    buffer = Buffer(bound, filter_uniform=True, min_size=min_size)
    buffer.admit("g0", size=3, version=0)
    buffer.fail("g0")
    for index, reward in enumerate(rewards):
        buffer.end((member("g0", index, reward=reward),))
    assert buffer.close("g0").left_out == why
    buffer.check()


def test_members_stand_in_the_order_of_their_ids_whatever_the_order_in_which_they_ended():
    buffer = buffer_of()
    buffer.admit("g0", size=3, version=0)
    for index in (2, 0, 1):
        buffer.end((member("g0", index, reward=float(index)),))
    assert [t.reward for t in buffer.close("g0").trajectories] == [0.0, 1.0, 2.0]


def test_tokens_older_than_their_admission_are_never_trained_beyond_the_bound():
    async def scenario():
        buffer = buffer_of(window=1)
        buffer.admit("g0", size=2, version=3)
        for index in range(2):
            buffer.end((member("g0", index, first=2, last=4, reward=float(index)),))
        buffer.close("g0")
        with pytest.raises(AccountingError, match=r"beyond the staleness bound; got: staleness 2 .* 0 \.\. 1;"):
            await buffer.take(4)

    asyncio.run(scenario())


def test_a_trajectory_that_is_lost_is_noticed():
    buffer = buffer_of()
    buffer.admit("g0", size=2, version=0)
    buffer.check()
    buffer.account.submitted += 1
    with pytest.raises(AccountingError, match="submitted 3, accounted for 2"):
        buffer.check()


def test_cancelling_names_the_trajectories_that_had_ended_those_in_training_included():
    async def scenario():
        buffer = buffer_of(window=2)
        for name in ("g0", "g1", "g2"):
            buffer.admit(name, size=2, version=0)
        for name in ("g0", "g1"):
            buffer.end((member(name, 0),))
        buffer.end((member("g0", 1, reward=1.0),))
        buffer.close("g0")
        await buffer.take(0)
        return buffer.cancel_all()

    assert sorted(asyncio.run(scenario())) == ["g0.0", "g0.1", "g1.0"]


def test_a_group_that_was_trained_before_and_is_left_out_when_the_run_goes_on_is_not_waited_for():
    async def scenario():
        buffer = buffer_of(window=1)
        buffer.admit("g1", size=2, version=0)
        fill(buffer, "g0", 0.0, 1.0)
        taking = asyncio.create_task(buffer.take(0, ["g1"]))
        await asyncio.sleep(0)
        assert not taking.done(), "g1 may still end well"
        for _ in range(2):
            buffer.fail("g1")
        assert buffer.close("g1").left_out == "small"
        return [group.id for group in await asyncio.wait_for(taking, HUNG_S)]

    assert asyncio.run(scenario()) == ["g0"]
