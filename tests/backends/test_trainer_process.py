"""One trainer in a process of its own; every test leaves it ready for the next one."""

import asyncio
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest

from oldlogits.backends.processes import WeightsInFiles, start_trainer
from oldlogits.config.load import config_from_table
from oldlogits.core.errors import ModelFolderError, VersionEvictedError, WorkerDiedError
from oldlogits.core.policies import OLD
from oldlogits.core.scoring import Scored
from oldlogits.models.load import load_model, named_weights
from oldlogits.rpc.client import Inline, client
from oldlogits.run.specs import trainer_spec
from oldlogits.train.calls import TrainerCalls
from oldlogits.train.trainer import Trainer, TrainerService

from ..builders import batch_of, sampled, trajectory
from ..waiting import HUNG_S

pytestmark = pytest.mark.slow

PROBE = [3, 9, 10, 11]
CONFIG = config_from_table({"trainer": {"minibatches_per_update": 1}})


def batch_at(version):
    return batch_of(
        [trajectory([3, 9], sampled([12, 13 + i, 2], version, logp=-3.0), id=f"g0.{i}") for i in range(2)], [1.0, -1.0]
    )


async def one_update(handle, version):
    """Publish, score at `version`, train; the published version, the scores and the result."""
    published = await handle.publish()
    weights = {name: w.clone() for name, w in published.update.tensors.items()}
    await handle.put_batch(batch := batch_at(version))
    tags = batch.version[batch.loss_mask]
    values = await handle.score(np.arange(len(tags)), version)
    result = await handle.train(Scored(policy=OLD, values=values, computed_at=tags, num_switches=1))
    return published, weights, values, result


def in_process(folder, scenario):
    async def main():
        process = start_trainer(trainer_spec(CONFIG), folder, PROBE)
        try:
            await process.ready()
            return await scenario(process, client(TrainerCalls, process))
        finally:
            process.close()

    return asyncio.run(asyncio.wait_for(main(), HUNG_S))


def children():
    return [child for child in multiprocessing.active_children() if child.name == "oldlogits-trainer"]


def test_a_trainer_process_does_what_a_trainer_does_bit_for_bit_and_leaves_nothing_behind(tiny_folder, tmp_path, shared_files):
    files = shared_files()

    async def scenario(process, trainer):
        updates = [await one_update(trainer, version) for version in range(2)]
        await trainer.put_batch(batch_at(7))
        with pytest.raises(VersionEvictedError, match="version 7 is not in the store") as caught:
            await trainer.score(np.arange(6), 7)
        assert caught.value.allowed == "0..1", "an error crosses with its parts"
        state = await trainer.state()  # and the process lives on
        await trainer.begin_checkpoint(tmp_path / "checkpoint", {})
        assert await trainer.end_checkpoint(wait=True)
        return updates, state

    updates, state = in_process(tiny_folder, scenario)
    trainer = Trainer(trainer_spec(CONFIG), tiny_folder, PROBE)
    here = client(TrainerCalls, Inline(TrainerService(trainer, time.perf_counter).call))
    for (published, weights, values, result), version in zip(updates, range(2), strict=True):
        expected, expected_weights, expected_values, expected_result = asyncio.run(one_update(here, version))
        assert published.version == expected.version == version
        assert set(weights) == set(expected_weights)
        assert all(np.array_equal(weights[name], w) for name, w in expected_weights.items())
        assert published.probe_logps.tolist() == expected.probe_logps.tolist()
        assert values.tolist() == expected_values.tolist()
        assert result.metrics == expected_result.metrics
    assert (state.version, state.num_parameters, state.consistency) == (
        2,
        trainer.live.num_parameters,
        trainer.scorer.checks.errors,
    )
    assert state.busy_s > 0
    saved = named_weights(load_model(tmp_path / "checkpoint" / "model"))
    assert all(np.array_equal(saved[name], w) for name, w in trainer.publish().update.tensors.items())
    assert children() == []
    assert shared_files() <= files


def test_a_trainer_that_is_killed_fails_the_pending_call_and_later_ones(tiny_folder):
    async def scenario(process, trainer):
        pid = process.pid
        os.kill(pid, signal.SIGSTOP)  # so that the call is pending when it dies
        pending = asyncio.create_task(trainer.publish())
        await asyncio.sleep(0.05)
        assert not pending.done()
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(WorkerDiedError, match="the trainer process ended; got: exit code -9"):
            await pending
        with pytest.raises(WorkerDiedError, match="exit code -9"):
            await trainer.state()

    in_process(tiny_folder, scenario)
    assert children() == []


def test_closing_removes_weights_that_nobody_could_take(tiny_folder, monkeypatch, shared_files):
    files = shared_files()

    def fail(self, value):
        if value is not None:  # ready has none
            raise OSError("no room")

    monkeypatch.setattr(WeightsInFiles, "decode", fail)

    async def scenario(process, trainer):
        with pytest.raises(WorkerDiedError, match="an answer that cannot be read: OSError: no room"):
            await trainer.publish()
        assert len(shared_files() - files) == 1

    in_process(tiny_folder, scenario)
    assert shared_files() <= files


def test_an_error_at_the_start_is_raised_by_ready_with_its_type(tmp_path):
    with pytest.raises(ModelFolderError, match="the model folder cannot be loaded"):
        in_process(tmp_path / "gone", None)
    assert children() == []


def test_closing_ends_a_trainer_in_mid_call_and_one_that_does_not_listen(tiny_folder):

    async def scenario(process, trainer):
        os.kill(process.pid, signal.SIGSTOP)
        return asyncio.create_task(trainer.state())

    in_process(tiny_folder, scenario)
    assert children() == []
