"""How many workers a run has follows the file that `oldlogits workers` writes, whatever else is written there."""

import asyncio

import pytest

from oldlogits.backends.ray import workers as ray_workers
from oldlogits.backends.ray.desired_workers import write_wanted
from oldlogits.backends.ray.workers import Workers
from oldlogits.core.engine import ServerOptions, Timeouts
from oldlogits.engines.http.fleet import Fleet

from ..waiting import HUNG_S

POLL_S = 0.01


@pytest.fixture
def followed(tmp_path, monkeypatch):
    """Plays a scenario beside `follow`, with workers that are never started; what was warned of."""
    monkeypatch.setattr(ray_workers, "POLL_S", POLL_S)

    async def follow(scenario):
        workers = Workers(
            lambda number: None,
            tmp_path,
            None,  # the weights of the cluster: no worker is started that would ask for them
            num_workers=2,
            environment_timeout_s=20.0,
            servers=ServerOptions(protocol="vllm"),
        )
        workers.fleet = Fleet(workers.replicas, Timeouts())
        warned = []
        workers.warn = lambda caution: warned.append(caution.message)
        following = asyncio.create_task(workers.follow())
        try:
            await scenario(workers.fleet, warned)
            assert not following.done(), "a run does not end of it"
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
            for replica in workers.fleet.replicas:
                await replica.server.close()

    return lambda scenario: asyncio.run(asyncio.wait_for(follow(scenario), HUNG_S))


async def until(holds):
    while not holds():
        await asyncio.sleep(POLL_S)


def test_workers_join_and_leave_as_wanted(tmp_path, followed):
    async def scenario(fleet, warned):
        for num in (2, 5, 1, 3):
            write_wanted(tmp_path, num)
            await until(lambda num=num: len(fleet.replicas) == num)
        assert warned == []

    followed(scenario)


def test_a_file_that_is_no_wish_is_said_once_and_kept(tmp_path, followed):
    path = tmp_path / "workers.json"

    async def scenario(fleet, warned):
        for num, rubbish in enumerate(("", '{"num_workers": 0}'), start=1):
            path.write_text(rubbish)
            await until(lambda num=num: len(warned) == num)
            await asyncio.sleep(5 * POLL_S)
            assert len(warned) == num
            assert path.read_text() == rubbish
        assert all("workers.json is no wish for workers" in message for message in warned)
        assert len(fleet.replicas) == 2
        write_wanted(tmp_path, 4)
        await until(lambda: len(fleet.replicas) == 4)
        path.write_text("")
        await until(lambda: len(warned) == 3)

    followed(scenario)


def test_a_file_that_is_half_written_at_one_look_is_read_at_the_next(tmp_path, followed, monkeypatch):
    texts = iter(['{"num_wor'])
    read = ray_workers.read_wanted

    def read_early(folder):
        if (text := next(texts, None)) is not None:
            (folder / "workers.json").write_text(text)
            try:
                return read(folder)
            finally:
                write_wanted(folder, 3)
        return read(folder)

    monkeypatch.setattr(ray_workers, "read_wanted", read_early)

    async def scenario(fleet, warned):
        await until(lambda: len(fleet.replicas) == 3)
        assert warned == []

    followed(scenario)
