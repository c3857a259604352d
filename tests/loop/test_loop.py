"""The order of calls and events of the loop, with an engine, a trainer and a source that only note what they are asked."""

import asyncio
import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from oldlogits.config.load import config_from_table
from oldlogits.core.engine import Generation, Sampling, Span
from oldlogits.core.engine_stats import EngineCapabilities, EngineStats
from oldlogits.core.errors import NonFiniteError, ProbeError
from oldlogits.core.policies import OLD
from oldlogits.core.scoring import Scored
from oldlogits.core.source import LogprobSource
from oldlogits.core.weights import FullWeights, StoreReceipt
from oldlogits.envs.parsers.plain import PlainParser
from oldlogits.loop.audit import ExactAudit
from oldlogits.loop.backend import Backend
from oldlogits.loop.calibration import Calibrator
from oldlogits.loop.loop import Loop
from oldlogits.loop.resume import LoopState
from oldlogits.loop.task import LoopConfig, Task
from oldlogits.loop.weight_sync import WeightSync
from oldlogits.models.chat.format import ChatFormat
from oldlogits.record.bus import EventBus
from oldlogits.record.event_log import EventLog
from oldlogits.record.folder import RunFolder
from oldlogits.record.recording import Recording
from oldlogits.rollout.environment_runner import run_inline
from oldlogits.rollout.journal.journal import Journal, read
from oldlogits.rollout.journal.records import Admitted, Failed
from oldlogits.rollout.player import ClassPlayer
from oldlogits.rollout.turns import Agent, TurnLimits
from oldlogits.train.reports import ConsistencyErrors, ProbeNoise, PublishedVersion, ScoringWork, TrainerState
from oldlogits.train.step import UpdateResult
from order_desk.tiny import tiny_tokenizer

CHAT = ChatFormat(tiny_tokenizer(["hello"]))
PROBE = (1, 2, 3)


class Coin:
    """A turn of one token; rewards of a group's two members differ."""

    num_made = 0

    def reset(self, **row):
        Coin.num_made += 1
        self.reward = Coin.num_made % 2

    def get_reward(self):
        return float(self.reward)

    def look(self):
        """Look."""


class FakeEngine:
    """Samples one token a request with the version that it holds; while it is paused, requests wait."""

    capabilities = EngineCapabilities(partials=True)

    def __init__(self, calls):
        self._calls, self.version, self._goes = calls, -1, asyncio.Event()
        self.probe_logps, self.paused = np.zeros(2, np.float32), False
        self.evaluates = asyncio.Event()  # whether episodes of an evaluation during training are sampled
        self.answers = asyncio.Event()  # whether probes are answered
        for one in (self.evaluates, self.answers):
            one.set()

    async def generate(self, prompt_ids, sampling, request_id):
        if sampling.prompt_logprobs:
            self._calls.append(f"probe v{self.version}")
            await self.answers.wait()
        if request_id.startswith("eduring"):
            await self.evaluates.wait()
        await self._goes.wait()
        return Generation(
            output_ids=(CHAT.end_of_turn_id,),
            logprobs=(-0.5,),
            spans=(Span(version=self.version, start=0, end=1),),
            finish_reason="stop",
            prompt_logprobs=tuple(self.probe_logps),
        )

    async def pause(self, mode, kv):
        self._calls.append("pause")
        self.paused = True
        self._goes.clear()

    async def partials(self):
        return {}

    async def update_weights(self, update, version):
        assert self.paused, "only between pause and resume"
        self._calls.append(f"update_weights v{version}")
        self.version = version

    async def resume(self):
        self._calls.append("resume")
        self.paused = False
        self._goes.set()

    async def stats(self):
        return EngineStats()


class FakeTrainer:
    """Makes versions out of nothing. `gate` holds up the optimizer steps; `error` is raised by them."""

    def __init__(self, calls):
        self._calls, self.version, self._next, self.error = calls, 0, 0, None
        self.gate, self.batch, self.started = asyncio.Event(), None, asyncio.Event()
        self.gate.set()

    async def state(self):
        return TrainerState(
            version=self.version,
            consistency=ConsistencyErrors(),
            num_parameters=30,
            num_trained=10,
            work=ScoringWork(),
            busy_s=0.0,
        )

    async def publish(self):
        self.version = self._next
        self._calls.append(f"publish v{self.version}")
        return PublishedVersion(
            version=self.version,
            update=FullWeights(tensors={}),
            probe_logps=np.zeros(2, np.float32),
            engine_probe_logps=np.zeros(2, np.float32),
            is_routed=False,
            probe_noise=ProbeNoise(),
            store_bytes=80,
            store_s=0.0,
            publication=StoreReceipt(version=self.version, stored_bytes=8, full_bytes=40, share_changed=0.5),
        )

    async def put_batch(self, batch):
        self._calls.append("put_batch")
        self.batch = batch

    async def train(self, scored):
        self._calls.append("train")
        self.started.set()
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        self._next = self.version + 1
        lags = self.version - self.batch.version[self.batch.loss_mask]
        counts = {int(lag): int((lags == lag).sum()) for lag in np.unique(lags)}
        return UpdateResult(
            metrics={"mask/rho": 1.0},
            staleness_counts=counts,
            provenance={"exact": len(lags)},
            lag0_max_abs_error=0.0,
            table={},
        )

    async def retain(self, oldest_needed):
        self._calls.append(f"retain v{oldest_needed}")

    async def begin_checkpoint(self, folder, parts):
        self._calls.append("save")
        for name, content in parts.items():
            (folder / name).write_bytes(content)

    async def end_checkpoint(self, wait):
        return True

    async def save_batch(self, folder):
        self._calls.append("save_batch")
        return folder


class FakeSource(LogprobSource):
    """Scores every token at its own version, and notes when it is told what."""

    provides = OLD

    def __init__(self, calls, *, needs_pause=False):
        self._calls, self.needs_pause, self.needs_partials = calls, needs_pause, needs_pause

    async def on_paused(self, running):
        self._calls.append("on_paused")

    async def on_published(self, version, update, probe_logps):
        self._calls.append(f"on_published v{version}")

    async def acquire(self, batch):
        self._calls.append("acquire")
        return Scored(policy=OLD, values=np.zeros(len(batch.versions)), computed_at=batch.versions, num_switches=0)

    def drop(self, trajectory_ids):
        self._calls.append(f"drop {len(list(trajectory_ids))}")

    async def close(self):
        self._calls.append("close")


class World:
    """A loop over fakes; `calls` holds their calls and, as ``event kind``, the events, in one order."""

    def __init__(self, path, *, needs_pause=False, num_updates=2, num_eval=0, real_time=False, overlap_every=0):
        self.calls = []
        self.folder = RunFolder.create(path / "run")
        self.log = EventLog(self.folder.events)
        noting = SimpleNamespace(emit=lambda event: event.kind and self.calls.append(f"event {event.kind}"))
        recording = Recording(folder=self.folder, events=EventBus(self.log, noting), log=self.log)
        self.engine, self.trainer = FakeEngine(self.calls), FakeTrainer(self.calls)
        table = {
            "num_updates": num_updates, "max_staleness": 1, "rollout": {"group_size": 2, "prompts_per_update": 2},
            "eval": {"num_episodes": num_eval, "num_calibration": 0}, "trainer": {"minibatches_per_update": 1},
            "record": {"checkpoint_every": 1}, "runtime": {"type": "local"},
        }  # fmt: skip
        if overlap_every:
            table["eval"] |= {"every": overlap_every, "num_episodes_during": 2, "overlap": True}
            table["record"] = {"checkpoint_every": 3, "keep_best": False}
        config = config_from_table(table)
        backend = Backend(
            engine=self.engine, trainer=self.trainer, run_environment=run_inline, real_time=real_time,
            clock=itertools.count(1.0).__next__,  # each look is a second later
        )  # fmt: skip
        limits = TurnLimits(max_turns=1, max_tokens_per_turn=4, max_tokens=40)
        agent = Agent(
            engine=self.engine, chat=CHAT, parser=PlainParser(), limits=limits, sampling=Sampling(max_tokens=4),
            run_environment=run_inline,
        )  # fmt: skip
        rows = SimpleNamespace(train=lambda index: {}, heldout=lambda num: [{}] * num, environments_of=lambda rows: ())
        task = Task(player=ClassPlayer(agent=agent, environment_class=Coin), rows=rows, probe_ids=PROBE)
        source, events = FakeSource(self.calls, needs_pause=needs_pause), recording.events
        self.journal = Journal(self.folder.rollouts)
        self.loop = Loop(
            LoopConfig.of(config), task, backend, source,
            sync=WeightSync(config.engine, config.sampling, PROBE, backend, source, events, self.journal),
            audit=ExactAudit.of(config, self.trainer, events, backend.clock),
            calibrator=Calibrator.of(config, self.trainer, events),
            recording=recording,
            journal=self.journal,
        )  # fmt: skip

    def first_update(self):
        """The calls from the first batch to the checkpoint after it, without what rollouts say of themselves."""
        begun = self.calls.index("event batch")
        ended = self.calls.index("event checkpoint", begun)
        return [call for call in self.calls[begun : ended + 1] if "group" not in call]


def run_world(path, scenario=lambda world: world.loop.run(), **settings):
    async def main():
        world = World(path, **settings)
        try:
            return world, await asyncio.gather(scenario(world), return_exceptions=True)
        finally:
            world.log.close()
            world.journal.close()

    world, [outcome] = asyncio.run(asyncio.wait_for(main(), 60))
    if isinstance(outcome, BaseException):
        world.error = outcome
    return world


START = ["publish v0", "event published", "pause", "update_weights v0", "resume", "event weights_updated", "probe v0"]


def test_the_engine_holds_the_first_version_and_is_probed_before_anything_is_sampled(tmp_path):
    world = run_world(tmp_path)
    begun = [*START, "event probe", "on_published v0", "save", "event checkpoint", "event group_admitted"]
    assert world.calls[: len(begun)] == begun


def test_an_update_scores_before_it_trains_and_trains_before_the_engine_is_paused(tmp_path):
    assert run_world(tmp_path).first_update() == [
        "event batch", "put_batch", "acquire", "event scored", "train",
        "publish v1", "event published",
        "pause", "update_weights v1", "resume", "event weights_updated", "probe v1", "event probe", "on_published v1",
        "drop 4", "retain v0", "event update",
        "save", "event checkpoint",
    ]  # fmt: skip


def test_a_source_that_needs_the_pause_has_it_before_it_scores_and_the_engine_stands_until_it_holds_the_version(tmp_path):
    assert run_world(tmp_path, needs_pause=True).first_update() == [
        "event batch", "put_batch", "pause", "on_paused", "acquire", "event scored", "train",
        "publish v1", "event published",
        "update_weights v1", "resume", "event weights_updated", "probe v1", "event probe", "on_published v1",
        "drop 4", "retain v0", "event update",
        "save", "event checkpoint",
    ]  # fmt: skip


def test_pauses_and_resumes_alternate_to_the_end_and_the_source_is_closed_last(tmp_path):
    for needs_pause in (False, True):
        calls = run_world(tmp_path / str(needs_pause), needs_pause=needs_pause, num_updates=3).calls
        turns = [call for call in calls if call in ("pause", "resume")]
        assert turns == ["pause", "resume"] * 4
        assert [call for call in calls if call.startswith("update_weights")] == [f"update_weights v{v}" for v in range(4)]
        assert calls[-1] == "close"


def test_evaluations_come_before_the_first_group_and_after_the_last_checkpoint(tmp_path):
    calls = run_world(tmp_path, num_eval=2).calls
    evaluations = [index for index, call in enumerate(calls) if call == "event evaluation"]
    assert len(evaluations) == 4, "sampled and greedy, before and after"
    assert evaluations[1] < calls.index("event group_admitted")
    assert evaluations[2] > max(index for index, call in enumerate(calls) if call == "event checkpoint")


def test_a_run_that_goes_on_does_not_repeat_the_first_evaluation_nor_its_rows(tmp_path):
    async def go_on(world):
        world.trainer.version = world.trainer._next = 1
        world.loop.go_on(
            LoopState(num_updates=1, is_evaluated=True, next_row=7, next_group=9, account={"submitted": 4, "trained": 4})
        )
        await world.loop.run()

    world = run_world(tmp_path, go_on, num_eval=2)
    assert not hasattr(world, "error"), world.error
    assert world.calls.count("event evaluation") == 2
    assert world.loop.state.num_updates == 2
    assert world.loop.state.next_row >= 7
    assert world.loop.buffer.account.trained == 8, "those of the checkpoint count"


def test_a_cancelled_run_finishes_the_update_that_it_is_in(tmp_path):
    async def cancel(world):
        world.trainer.gate.clear()
        task = asyncio.create_task(world.loop.run())
        await world.trainer.started.wait()
        task.cancel()
        for _ in range(20):
            await asyncio.sleep(0)
        assert not task.done(), "the optimizer steps go on"
        world.trainer.gate.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    world = run_world(tmp_path, cancel)
    assert not hasattr(world, "error"), world.error
    done = world.calls[world.calls.index("train") :]
    assert [call for call in done if "group" not in call][:-1] == [
        "train", "publish v1", "event published", "pause", "update_weights v1", "resume", "event weights_updated", "probe v1",
        "event probe", "on_published v1", "drop 4", "retain v0", "event update",
    ]  # fmt: skip
    assert world.calls[-1] == "close"
    assert world.loop.state.num_updates == 1


def test_an_engine_that_does_not_hold_the_version_ends_the_run_before_anything_is_sampled_with_it(tmp_path):
    async def wrong(world):
        world.engine.probe_logps = np.ones(2, np.float32)
        await world.loop.run()

    world = run_world(tmp_path, wrong)
    assert isinstance(world.error, ProbeError)
    assert world.calls == [*START, "close"]


def test_where_time_is_real_a_version_is_checked_beside_the_next_update_which_trains_nothing_if_it_is_wrong(tmp_path):
    async def wrong_from_the_first_update_on(world):
        publish = world.trainer.publish

        async def publish_and_break():
            world.engine.probe_logps = np.full(2, float(world.trainer._next), np.float32)
            return await publish()

        world.trainer.publish = publish_and_break
        await world.loop.run()

    world = run_world(tmp_path, wrong_from_the_first_update_on, real_time=True, num_updates=3, overlap_every=9)
    [error] = world.error.exceptions
    assert isinstance(error, ProbeError)
    assert world.calls.count("train") == 1
    assert world.calls.index("put_batch", world.calls.index("train")) > world.calls.index("probe v1"), "scored, and not trained"
    assert world.loop.state.num_updates == 1


def test_where_time_is_real_every_version_is_checked_before_a_checkpoint_of_it_is_written(tmp_path):
    calls = run_world(tmp_path, real_time=True).calls
    for version in (1, 2):
        assert calls.index("event probe", calls.index(f"probe v{version}")) < calls.index(
            "save", calls.index(f"publish v{version}")
        )


def test_the_checkpoint_of_a_run_that_was_interrupted_waits_for_the_check_of_its_version(tmp_path):
    """The run is interrupted where an evaluation waits until the engine has answered the probe."""

    async def interrupt(world):
        update_weights = world.engine.update_weights

        async def hold(update, version):
            await update_weights(update, version)
            if version == 1:
                world.engine.answers.clear()

        world.engine.update_weights = hold
        running = asyncio.create_task(world.loop.run())
        while "event update" not in world.calls or "probe v1" not in world.calls:
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        running.cancel()
        await asyncio.wait({running})
        saving = asyncio.create_task(world.loop.checkpoint())
        for _ in range(9):
            await asyncio.sleep(0)
        assert "save" not in world.calls[world.calls.index("probe v1") :]
        world.engine.answers.set()
        await saving

    world = run_world(tmp_path, interrupt, real_time=True, num_updates=9, overlap_every=1)
    assert not hasattr(world, "error"), world.error
    calls = world.calls[world.calls.index("probe v1") :]
    assert calls.index("event probe") < calls.index("save")


def test_an_evaluation_that_overlaps_training_is_of_the_version_at_which_it_began_and_names_all_that_sampled_it(tmp_path):
    async def release_after_the_fourth(world):
        world.engine.evaluates.clear()
        found = []
        bus = world.loop._events
        bus._subscribers += (SimpleNamespace(emit=lambda event: event.kind == "evaluation" and found.append(event)),)
        update_weights = world.engine.update_weights

        async def release(update, version):
            await update_weights(update, version)
            if version == 4:
                world.engine.evaluates.set()

        world.engine.update_weights = release
        await world.loop.run()
        world.found = found

    world = run_world(tmp_path, release_after_the_fourth, real_time=True, num_updates=5, overlap_every=3)
    assert not hasattr(world, "error"), world.error
    [played] = world.found
    assert (played.stage, played.version, played.versions, played.num_episodes) == ("during", 3, [4], 2)
    updates = [i for i, call in enumerate(world.calls) if call == "event update"]
    assert updates[2] < updates[3] < world.calls.index("event evaluation"), "it did not hold up the fourth update"
    state = LoopState.read(world.folder.checkpoints / "v000003")
    assert state.success is None


def test_a_run_that_is_stopped_says_which_overlapping_evaluation_it_has_cut_short(tmp_path):
    async def stop_after_the_fourth(world):
        world.engine.evaluates.clear()
        world.found = []
        bus = world.loop._events
        bus._subscribers += (SimpleNamespace(emit=lambda event: event.kind == "warning" and world.found.append(event)),)
        running = asyncio.create_task(world.loop.run())
        while world.loop.state.num_updates < 4:
            await asyncio.sleep(0)
        running.cancel()
        await asyncio.wait({running})

    world = run_world(tmp_path, stop_after_the_fourth, real_time=True, num_updates=5, overlap_every=3)
    assert [(one.name, one.version) for one in world.found if one.name == "cut-evaluation"] == [("cut-evaluation", 3)]


def test_a_run_that_goes_on_plays_the_overlapping_evaluation_of_its_checkpoint_again(tmp_path):
    async def go_on(world):
        world.trainer.version = world.trainer._next = 3
        world.loop.go_on(LoopState(num_updates=3, is_evaluated=True, account={"submitted": 12, "trained": 12}))
        await world.loop.run()

    world = run_world(tmp_path, go_on, real_time=True, num_updates=5, overlap_every=3)
    assert not hasattr(world, "error"), world.error
    assert world.calls.count("event evaluation") == 1


def test_a_loss_that_is_not_finite_saves_its_batch_and_publishes_nothing(tmp_path):
    async def break_down(world):
        world.trainer.error = NonFiniteError("the loss", got="nan", allowed="finite", fix="lower it")
        await world.loop.run()

    world = run_world(tmp_path, break_down)
    [error] = world.error.exceptions
    assert isinstance(error, NonFiniteError)
    assert "failed_batch" in str(error)
    assert [call for call in world.calls[world.calls.index("train") :] if "group" not in call][:2] == ["train", "save_batch"]
    assert "publish v1" not in world.calls


def test_a_checkpoint_remembers_what_outlives_it(tmp_path):
    world = run_world(tmp_path)
    state = LoopState.read(world.folder.checkpoints / "v000001")
    assert (state.num_updates, state.is_evaluated) == (1, True)
    kinds = [call.removeprefix("event ") for call in world.calls if call.startswith("event")]
    assert kinds[: state.num_events].count("update") == 1
    assert kinds[: state.num_events].count("checkpoint") == 1, "that of the start"
    account, in_flight = state.account, read(world.folder.checkpoints / "v000001", world.folder.rollouts, 99).groups
    counted = sum(account[name] for name in ("trained", "filtered", "failed", "cancelled"))
    assert account["submitted"] == counted + sum(group.admitted.size for group in in_flight.values())
    assert account["submitted"] > counted, "some are in flight, or nothing was tested"


def test_the_copies_of_what_is_trained_are_those_of_the_adapters_not_of_the_base(tmp_path):
    async def watch(world):
        world.metrics = []
        bus = world.loop._events
        bus._subscribers += (SimpleNamespace(emit=lambda event: world.metrics.append(getattr(event, "metrics", None))),)
        await world.loop.run()

    world = run_world(tmp_path, watch)
    metrics = next(found for found in world.metrics if found)
    assert metrics["copies/trainer"] == 1 + 80 / (4 * 10), "80 stored bytes beside 10 trained parameters of 30"
    assert metrics["copies/engine"] == 1
    assert "throughput/engine_busy_tokens_per_s" not in metrics, "nothing was sampled by the engine's count"


def test_a_run_that_ends_before_it_has_gone_on_with_its_groups_counts_them_as_cancelled(tmp_path):
    async def scenario(world):
        world.journal.progress.apply(Admitted(group="g000000", row=0, version=0, size=4))
        world.journal.progress.apply(Failed(episode="g000000.1", again=False, version=0, reason="no"))
        world.loop.go_on(LoopState())
        world.loop.cancel_all()
        world.loop.buffer.check()
        account = world.loop.buffer.account
        assert (account.submitted, account.failed, account.cancelled) == (4, 1, 3)

    world = run_world(tmp_path, scenario)
    assert not hasattr(world, "error"), world.error
