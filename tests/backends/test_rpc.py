"""The laws of the one RPC, with real processes."""

import asyncio
import gc
import inspect
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import oldlogits
from oldlogits.core.errors import ConfigError, UnknownCallError, WorkerDiedError
from oldlogits.rpc.child import Call, serve_calls
from oldlogits.rpc.client import Dispatcher, Inline, calls_of, client
from oldlogits.rpc.process import ChildProcess, Deadline
from oldlogits.rpc.processes import keeping_what_is_built
from oldlogits.train.calls import TrainerCalls
from oldlogits.train.scorer import Scorer
from oldlogits.train.trainer import Trainer

from ..waiting import HUNG_S, is_running, wait_until
from .notebook import Notes, build, chatter


def play(scenario, *, first="one", **options):
    async def main():
        process = ChildProcess("notes", serve_calls, (build, (first,)), fix="ask", **options)
        try:
            return await scenario(process, client(Notes, process, owner="me"))
        finally:
            process.close()

    before = threading.active_count()
    result = asyncio.run(asyncio.wait_for(main(), HUNG_S))
    assert threading.active_count() == before, "no thread stays behind"
    return result


@pytest.mark.parametrize("is_pipelined", [False, True])
def test_calls_are_carried_out_in_the_order_in_which_they_were_made(is_pipelined):
    async def scenario(process, notes):
        assert await asyncio.gather(*(notes.add(str(i)) for i in range(50))) == list(range(2, 52))
        return await notes.read()

    assert play(scenario, is_pipelined=is_pipelined) == ["one", *map(str, range(50))]


def test_arguments_travel_by_position_by_name_and_by_default_and_properties_are_values():
    async def scenario(process, notes):
        assert await notes.add("a") == 2
        assert await notes.add("b", times=2) == 4
        assert await notes.add(times=1, word="c") == 5
        with pytest.raises(TypeError, match="word"):
            await notes.add(wrong=1)
        return notes.owner

    assert play(scenario) == "me"


def test_a_child_that_is_ready_has_its_garbage_collector_leave_alone_what_it_was_built_of():
    async def scenario(process, notes):
        before = await notes.num_left_alone()
        await process.ready()
        return before, await notes.num_left_alone()

    before, after = play(scenario)
    assert before == 0
    assert after > 10_000


def test_what_is_left_alone_for_a_while_is_read_again_afterwards():
    before = gc.get_freeze_count()
    with keeping_what_is_built():
        assert gc.get_freeze_count() > 10_000
    assert gc.get_freeze_count() <= before


def test_an_error_of_the_package_crosses_with_its_type_and_parts_and_the_process_lives_on():
    async def scenario(process, notes):
        with pytest.raises(ConfigError) as caught:
            await notes.fail("own")
        assert (caught.value.what, caught.value.got, caught.value.allowed, caught.value.fix) == ("no such word", "x", "y", "z")
        return await notes.read()

    assert play(scenario) == ["one"]


def test_an_error_at_the_start_is_raised_by_ready_and_by_every_call():
    async def scenario(process, notes):
        for call in (process.ready, notes.read):
            with pytest.raises(ConfigError, match="an empty word"):
                await call()

    play(scenario, first="")


def test_a_defect_ends_the_process_and_is_told_to_whoever_waits():
    async def scenario(process, notes):
        watching = asyncio.create_task(process.watch())
        failing, waiting = asyncio.create_task(notes.fail("defect")), asyncio.create_task(notes.read())
        for call in (failing, waiting, watching):
            with pytest.raises(WorkerDiedError, match=r"the notes process ended; got: ZeroDivisionError: by zero; .*fix: ask"):
                await call

    play(scenario)


def test_a_killed_child_fails_pending_and_later_calls_and_the_watch():
    async def scenario(process, notes):
        await process.ready()
        os.kill(process.pid, signal.SIGSTOP)  # so that the call is pending when it dies
        calls = [asyncio.create_task(notes.read()), asyncio.create_task(process.watch())]
        await asyncio.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        for call in (*calls, notes.read()):
            with pytest.raises(WorkerDiedError, match="exit code -9"):
                await call

    play(scenario)


def test_a_frozen_child_is_killed_at_the_deadline_and_every_call_says_so():
    async def scenario(process, notes):
        await process.ready()
        os.kill(process.pid, signal.SIGSTOP)
        waiting = asyncio.create_task(notes.read())
        await asyncio.sleep(0)
        with pytest.raises(WorkerDiedError, match=r"no answer to add within 0\.2 s"):
            await client(Notes, Deadline(process, 0.2), owner="me").add("x")
        for call in (waiting, notes.read()):
            with pytest.raises(WorkerDiedError, match="no answer to add"):
                await call

    play(scenario)


def test_ctrl_c_and_sigterm_are_the_parents_to_handle():
    async def scenario(process, notes):
        await process.ready()
        os.kill(process.pid, signal.SIGINT)
        os.kill(process.pid, signal.SIGTERM)
        return await notes.read()

    assert play(scenario) == ["one"]


@pytest.mark.parametrize("rubbish", [b"\x80\x04rubbish", b""])
def test_rubbish_on_the_way_to_the_child_ends_it_with_an_error(rubbish):
    async def scenario(process, notes):
        await process.ready()
        process._pipe.send_bytes(rubbish)
        with pytest.raises(WorkerDiedError, match="the notes process ended"):
            await notes.read()

    play(scenario)


def test_what_is_no_call_ends_the_child_with_an_error():
    async def scenario(process, notes):
        await process.ready()
        process._pipe.send({"method": "read"})
        with pytest.raises(WorkerDiedError, match="TypeError: dict on the pipe where a call is due"):
            await notes.read()

    play(scenario)


def test_an_answer_that_cannot_be_read_fails_the_calls_and_kills_the_child():
    async def main():
        process = ChildProcess("notes", chatter, (), fix="ask")
        try:
            with pytest.raises(WorkerDiedError, match="an answer that cannot be read: UnpicklingError"):
                await process.ready()
        finally:
            process.close()

    asyncio.run(asyncio.wait_for(main(), HUNG_S))


def test_nothing_but_the_methods_of_the_protocol_can_be_called():
    async def scenario(process, notes):
        with pytest.raises(UnknownCallError, match="'erase'; allowed: add, echo, fail, num_left_alone, read, rest"):
            await process.call("erase", ())
        with pytest.raises(UnknownCallError, match="__init__"):
            await process.call("__init__", ("two",))
        assert not hasattr(notes, "erase")
        return await notes.read()

    assert play(scenario) == ["one"]


@pytest.mark.slow
def test_a_call_that_is_cancelled_before_it_is_sent_is_never_carried_out_and_a_later_one_is():
    async def scenario(process, notes):
        await process.ready()
        resting = asyncio.create_task(notes.rest(0.3))
        added = asyncio.create_task(notes.add("never"))
        await asyncio.sleep(0.05)
        added.cancel()
        with pytest.raises(asyncio.CancelledError):
            await added
        resting.cancel()  # it was sent: it is carried out, and its result is dropped
        with pytest.raises(asyncio.CancelledError):
            await resting
        return await notes.read()

    assert play(scenario) == ["one"]


def test_an_argument_that_cannot_be_sent_fails_its_own_call_alone():
    async def scenario(process, notes):
        with pytest.raises((TypeError, AttributeError), match="pickle"):
            await notes.echo(threading.Lock())
        return await notes.echo([1, 2])

    assert play(scenario) == [1, 2]


def test_closing_fails_what_is_pending_and_may_be_repeated():
    async def scenario(process, notes):
        await process.ready()
        resting = asyncio.create_task(notes.rest(HUNG_S))
        await asyncio.sleep(0.05)
        process.close()
        for call in (resting, notes.read()):
            with pytest.raises(WorkerDiedError, match="it was closed"):
                await call

    play(scenario)


def test_a_client_is_idle_unless_a_call_is_being_carried_out():
    async def scenario(process, notes):
        assert notes.is_idle
        reading = asyncio.create_task(notes.read())
        await asyncio.sleep(0)
        assert not notes.is_idle
        await reading
        return notes.is_idle

    assert play(scenario)


def test_an_inline_call_is_carried_out_before_anything_else_goes_on():
    order = []

    async def main():
        notes = client(Notes, Inline(lambda method, arguments: order.append(method)), owner="me")
        other = asyncio.create_task(asyncio.sleep(0))
        other.add_done_callback(lambda _: order.append("other"))
        await notes.read()
        await other
        await asyncio.sleep(0)

    asyncio.run(main())
    assert order == ["read", "other"]


def test_a_client_without_a_value_of_a_property_and_a_dispatcher_without_a_method_are_refused():
    with pytest.raises(AssertionError, match="wants a value of owner"):
        client(Notes, Inline(lambda method, arguments: None))
    with pytest.raises(AssertionError, match="nobody has echo, num_left_alone, rest of Notes"):
        Dispatcher(Notes, type("Half", (), {"add": 1, "read": 1, "fail": 1})())


def test_every_call_of_a_trainer_is_a_method_of_the_trainer_or_of_its_scorer_with_the_same_parameters():
    for name in calls_of(TrainerCalls):
        [owner] = [cls for cls in (Trainer, Scorer) if hasattr(cls, name)]
        face, body = inspect.signature(getattr(TrainerCalls, name)), inspect.signature(getattr(owner, name))
        assert list(face.parameters) == list(body.parameters), name
        assert face.return_annotation == body.return_annotation, name


def test_calls_are_values():
    assert Call(number=1, method="read", arguments=()) == Call(number=1, method="read", arguments=())


@pytest.mark.slow
def test_a_frozen_child_is_found_and_killed_and_its_calls_say_so():
    async def scenario(process, notes):
        await process.ready()
        os.kill(process.pid, signal.SIGSTOP)
        with pytest.raises(WorkerDiedError, match="no heartbeat for 3 s: it is frozen"):
            await notes.read()
        with pytest.raises(WorkerDiedError, match="frozen"):
            await process.watch()

    play(scenario, heartbeat_timeout_s=3.0)


@pytest.mark.slow
def test_a_child_that_is_busy_for_longer_than_its_heartbeats_may_be_missing_is_not_frozen():
    async def scenario(process, notes):
        await process.ready()
        await notes.rest(4.5)
        return await notes.read()

    assert play(scenario, heartbeat_timeout_s=3.0) == ["one"]


ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(oldlogits.__file__).parents[1]), str(Path.cwd())])}

ORPHAN = """
import asyncio, os, sys, time
from oldlogits.rpc.child import serve_calls
from oldlogits.rpc.process import ChildProcess
from tests.backends.notebook import build

if __name__ == "__main__":
    process = ChildProcess("notes", serve_calls, (build, ("one",)), fix="ask")
    asyncio.run(process.ready())
    if (forked := os.fork()) == 0:
        time.sleep(1000)
    print(process.pid, forked, flush=True)
    time.sleep(1000)
"""


@pytest.mark.slow
def test_a_child_ends_with_its_parent_even_where_a_fork_of_the_parent_keeps_the_pipe(tmp_path):
    (tmp_path / "orphan.py").write_text(ORPHAN)
    parent = subprocess.Popen([sys.executable, tmp_path / "orphan.py"], stdout=subprocess.PIPE, env=ENVIRONMENT, text=True)
    child, forked = map(int, parent.stdout.readline().split())
    try:
        parent.kill()
        wait_until(lambda: not is_running(child), "the child ends")
        assert is_running(forked)
    finally:
        os.kill(forked, signal.SIGKILL)
        parent.wait()
        parent.stdout.close()
