import asyncio
import inspect
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from oldlogits.backends.ray.remote_environments import AwaitingRunner
from oldlogits.rollout import environment_runner as environment
from oldlogits.rollout.environment_errors import EnvironmentFailed
from oldlogits.rollout.environment_runner import ThreadRunner, run_inline

from ..waiting import HUNG_S


def runners():
    return [run_inline, ThreadRunner(timeout_s=HUNG_S, latency_s=0, seed=0)]


def in_both(call):
    async def both():
        return [await runner(call) for runner in runners()]

    return asyncio.run(both())


async def later(value):
    await asyncio.sleep(0)
    return value


def fails(error):
    def call():
        raise error

    return call


async def fails_later(error):
    await asyncio.sleep(0)
    raise error


def test_a_result_is_returned_whether_it_is_there_or_awaited():
    assert in_both(lambda: 7) == [7, 7]
    assert in_both(lambda: later(8)) == [8, 8]


@pytest.mark.parametrize("call", [fails(KeyError("order")), lambda: fails_later(KeyError("order"))])
@pytest.mark.parametrize("which", [0, 1])
def test_whatever_an_environment_raises_fails_its_episode_with_type_and_text(which, call):
    with pytest.raises(EnvironmentFailed, match=r"^KeyError: 'order'$") as caught:
        asyncio.run(runners()[which](call))
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize("error", [asyncio.CancelledError, GeneratorExit, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("which", [0, 1])
def test_whatever_leaks_out_of_environment_code_fails_its_episode(which, error):
    for call in (fails(error("leaked")), lambda: fails_later(error("leaked"))):
        with pytest.raises(EnvironmentFailed, match=f"^{error.__name__}: leaked$"):
            asyncio.run(runners()[which](call))


def test_inline_code_runs_in_the_calling_thread_and_threaded_code_does_not():
    here, there = in_both(threading.get_ident)
    assert here == threading.get_ident() != there


@pytest.mark.parametrize("event", [threading.Event, asyncio.Event])
def test_a_call_that_takes_too_long_fails_with_the_deadline(event):
    never = event()
    with pytest.raises(EnvironmentFailed, match=r"^timed out after 0\.05 s$"):
        asyncio.run(ThreadRunner(timeout_s=0.05, latency_s=0, seed=0)(never.wait))
    never.set()


def test_a_time_out_inside_the_environment_is_not_taken_for_the_deadline():
    with pytest.raises(EnvironmentFailed, match=r"^TimeoutError: the shop did not answer$"):
        asyncio.run(ThreadRunner(timeout_s=HUNG_S, latency_s=0, seed=0)(fails(TimeoutError("the shop did not answer"))))


def test_a_slow_call_does_not_hold_up_others():
    async def race():
        runner = ThreadRunner(timeout_s=HUNG_S, latency_s=0, seed=0)
        runs, ends = threading.Event(), threading.Event()
        slow = asyncio.create_task(runner(lambda: runs.set() or ends.wait()))
        while not runs.is_set():
            await asyncio.sleep(0)
        assert await runner(lambda: 1) == 1
        assert not slow.done()
        ends.set()
        assert await slow

    asyncio.run(race())


def test_a_simulated_latency_is_exponential_repeatable_and_for_tools_only(monkeypatch):
    slept = []

    async def sleep(seconds):
        slept.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)

    async def play(seed):
        slept.clear()
        runner = ThreadRunner(timeout_s=HUNG_S, latency_s=0.2, seed=seed)
        await runner(lambda: 0)
        assert slept == []
        for _ in range(400):
            await runner(lambda: 0, is_tool=True)
        return list(slept)

    first = asyncio.run(play(1))
    assert asyncio.run(play(1)) == first != asyncio.run(play(2))
    mean = sum(first) / 400
    assert abs(mean - 0.2) < 4 * 0.2 / 400**0.5
    assert abs(sum(s > 0.2 for s in first) / 400 - 0.3679) < 4 * (0.3679 * 0.6321 / 400) ** 0.5


def test_latency_does_not_count_towards_the_deadline(monkeypatch):
    """A loop whose clock stands still but for the latency: it alone could use up the deadline."""

    async def main():
        loop = asyncio.get_running_loop()
        now, latencies = loop.time(), []

        async def sleep(seconds):
            latencies.append(seconds)

        monkeypatch.setattr(loop, "time", lambda: now + sum(latencies))
        monkeypatch.setattr(asyncio, "sleep", sleep)
        assert await ThreadRunner(timeout_s=0.001, latency_s=3e6, seed=3)(lambda: 1, is_tool=True) == 1
        assert latencies[0] > 0.001

    asyncio.run(main())


def test_a_tool_that_hangs_does_not_keep_the_interpreter_from_exiting():
    code = """
        import asyncio, threading
        from oldlogits.rollout.environment_errors import EnvironmentFailed
        from oldlogits.rollout.environment_runner import ThreadRunner

        async def main():
            try:
                await ThreadRunner(timeout_s=0.05, latency_s=0, seed=0)(threading.Event().wait)
            except EnvironmentFailed as failed:
                print(failed, flush=True)

        asyncio.run(main())
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "timed out after 0.05 s\n"
        assert process.wait(timeout=HUNG_S) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize("which", [0, 1])
def test_an_environment_that_exits_ends_its_episode_not_the_program(which):
    with pytest.raises(EnvironmentFailed, match=r"^SystemExit: 3$"):
        asyncio.run(runners()[which](lambda: sys.exit(3)))


def test_waiting_for_a_thread_does_not_count_towards_the_deadline(monkeypatch):
    monkeypatch.setattr(environment, "NUM_THREADS", 1)

    async def queue():
        loop, passed = asyncio.get_running_loop(), []
        now = loop.time()
        monkeypatch.setattr(loop, "time", lambda: now + 10.0 * len(passed))  # 10 s pass with every call, and none between
        runner = ThreadRunner(timeout_s=15, latency_s=0, seed=0)
        return await asyncio.gather(*(runner(lambda i=i: passed.append(i) or i) for i in range(5)))

    assert asyncio.run(queue()) == [0, 1, 2, 3, 4]


def test_a_call_that_never_returns_leaves_room_for_others(monkeypatch):
    monkeypatch.setattr(environment, "NUM_THREADS", 1)
    release = threading.Event()

    async def main():
        runner = ThreadRunner(timeout_s=0.05, latency_s=0, seed=0)
        for _ in range(3):
            with pytest.raises(EnvironmentFailed):
                await runner(release.wait)
        runner._timeout_s = HUNG_S
        return await runner(lambda: 1)

    try:
        assert asyncio.run(main()) == 1
    finally:
        release.set()


@pytest.mark.slow
def test_asynchronous_code_that_blocks_holds_up_no_other_episode_and_not_the_run():
    """A tool that blocks for 2 s: calls of others are no time-outs, and the run's own loop goes on."""
    runner, blocks, came = ThreadRunner(timeout_s=HUNG_S, latency_s=0, seed=0), threading.Event(), []

    async def blocking():
        blocks.set()
        time.sleep(2.0)
        return "late"

    async def quick():
        await asyncio.sleep(0.01)
        return "quick"

    async def main():
        late = asyncio.ensure_future(runner(blocking, is_tool=True))
        await asyncio.to_thread(blocks.wait, HUNG_S)
        others = [asyncio.ensure_future(runner(quick)) for _ in range(4)]
        for _ in range(100):
            await asyncio.sleep(0)
            came.append(late.done())
        assert await runner(lambda: "thread") == "thread"
        came.append(late.done())
        return await late, await asyncio.gather(*others)

    assert asyncio.run(main()) == ("late", ["quick"] * 4)
    assert not any(came), "the loop came round while it blocked"


@pytest.mark.slow
def test_asynchronous_code_that_never_returns_to_its_loop_is_a_time_out_and_others_begin_again_or_go_on():
    end, blocks = threading.Event(), threading.Event()

    async def blocking():
        blocks.set()
        end.wait()

    blocking_line = blocking.__code__.co_firstlineno + 2

    async def patient():
        await asyncio.sleep(HUNG_S)

    async def main():
        runner = ThreadRunner(timeout_s=0.5, latency_s=0, seed=0)
        waiting = asyncio.ensure_future(ThreadRunner(timeout_s=0.5, latency_s=0, seed=0)(patient))
        await asyncio.sleep(0)
        failed = asyncio.ensure_future(runner(blocking))
        found = await asyncio.gather(waiting, failed, return_exceptions=True)
        return *found, await runner(lambda: later(9))

    other, own, after = asyncio.run(main())
    end.set()
    assert type(own) is EnvironmentFailed
    assert str(own).startswith("timed out after 0.5 s: it blocked the event loop of all episodes in ")
    assert str(own).endswith(f"blocking (test_environment_runner.py, line {blocking_line})")
    assert isinstance(other, EnvironmentFailed)
    assert after == 9, "another loop takes what comes"


def test_asynchronous_code_of_all_episodes_runs_on_one_loop_that_is_not_the_runs():
    async def loop():
        return asyncio.get_running_loop()

    async def main():
        first, second = [ThreadRunner(timeout_s=HUNG_S, latency_s=0, seed=0) for _ in range(2)]
        return await first(loop), await second(loop), asyncio.get_running_loop()

    one, other, own = asyncio.run(main())
    assert one is other is not own


def test_a_call_that_is_cancelled_is_cancelled_on_its_loop():
    begun, ended = threading.Event(), threading.Event()

    async def waits():
        begun.set()
        try:
            await asyncio.sleep(HUNG_S)
        finally:
            ended.set()

    async def main():
        call = asyncio.ensure_future(ThreadRunner(timeout_s=HUNG_S, latency_s=0, seed=0)(waits))
        await asyncio.to_thread(begun.wait, HUNG_S)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call

    asyncio.run(main())
    assert ended.wait(HUNG_S)


@pytest.mark.parametrize("kind", [ThreadRunner, AwaitingRunner])
def test_what_a_thread_makes_for_a_call_that_was_cancelled_meanwhile_is_closed(kind):
    begun, may_end, made = threading.Event(), threading.Event(), later(1)

    def makes():
        begun.set()
        may_end.wait(HUNG_S)
        return made

    async def main():
        runner = (
            AwaitingRunner(latency_s=0, seed=0)
            if kind is AwaitingRunner
            else ThreadRunner(timeout_s=HUNG_S, latency_s=0, seed=0)
        )
        call = asyncio.ensure_future(runner(makes))
        await asyncio.to_thread(begun.wait, HUNG_S)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        may_end.set()
        while inspect.getcoroutinestate(made) != inspect.CORO_CLOSED:
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(main(), HUNG_S))


def test_a_call_whose_time_is_up_before_it_has_ended_has_no_result_whatever_begins_in_that_moment():
    async def scenario():
        call = environment._Timed(lambda: 7, HUNG_S, delays_tools=False)
        waiting = asyncio.ensure_future(call.in_time())
        await asyncio.sleep(0)
        call._began_s = time.monotonic()  # the next of the calls that are handed over together
        call._done.set_result(None)
        with pytest.raises(EnvironmentFailed, match="timed out"):
            await waiting

    asyncio.run(scenario())


def test_what_a_thread_makes_when_the_run_has_ended_meanwhile_is_closed_and_not_reported(caplog):
    begun, may_end, made = threading.Event(), threading.Event(), later(1)

    def makes():
        begun.set()
        may_end.wait(HUNG_S)
        return made

    async def main():
        asyncio.get_running_loop().call_later(0.05, may_end.set)
        call = asyncio.ensure_future(AwaitingRunner(latency_s=0.0, seed=0)(makes))
        await asyncio.to_thread(begun.wait, HUNG_S)
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:  # as asyncio ends a run: all at once
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        assert call.cancelled()

    asyncio.run(main())  # it waits for its threads
    assert inspect.getcoroutinestate(made) == inspect.CORO_CLOSED
    assert not caplog.records
