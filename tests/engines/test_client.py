"""The client of one server, against one that answers `GET /health` and nothing else."""

import asyncio
import gc
import warnings
from contextlib import asynccontextmanager

import pytest

from oldlogits.core.server import ServerFailedError
from oldlogits.engines.http.client import HttpClient
from oldlogits.engines.protocols.vllm import VllmProtocol

from ..waiting import HUNG_S

NUM_IDLE = 4
KEPT_S = 2.0
"""Seconds after which the client closes idle connections."""


@asynccontextmanager
async def answering():
    """A server; yields a client of it."""

    answered = []

    async def answer(reader, writer):
        answered.append(asyncio.current_task())
        try:
            while True:
                await reader.readuntil(b"\r\n\r\n")
                await asyncio.sleep(0.02)
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    listening = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    async with listening:
        client = VllmProtocol(HttpClient(f"http://127.0.0.1:{port}", token="", control_timeout_s=HUNG_S))
        yield client
        await client.close()
        await asyncio.wait(answered)  # the other ends close, too


@pytest.mark.slow
def test_a_request_that_is_cancelled_at_any_step_loses_no_connection():
    """Such as idle ones that had to be closed first."""

    async def play(num_steps):
        async with answering() as client:
            await asyncio.gather(*(client.check_health(HUNG_S) for _ in range(NUM_IDLE)))
            await asyncio.sleep(KEPT_S + 0.1)
            late = asyncio.create_task(client.check_health(HUNG_S))
            for _ in range(num_steps):
                await asyncio.sleep(0)
            late.cancel()
            with pytest.raises(asyncio.CancelledError):
                await late

    async def play_all():
        await asyncio.gather(*map(play, range(1, 13)))

    with warnings.catch_warnings(record=True) as lost:
        warnings.simplefilter("always")
        asyncio.run(play_all())
        gc.collect()
    assert [str(warning.message) for warning in lost] == []


@pytest.mark.parametrize("num_rounds", range(1, 13))
def test_closing_the_client_ends_what_it_waits_for_however_far_that_is(num_rounds):
    async def play():
        async with answering() as client:
            waiting = asyncio.create_task(client.check_health(HUNG_S))
            for _ in range(num_rounds):
                await asyncio.sleep(0)
            await client.close()
            with pytest.raises(ServerFailedError, match="given up"):
                await waiting
            with pytest.raises(ServerFailedError, match="given up"):
                await client.check_health(HUNG_S)

    asyncio.run(play())
