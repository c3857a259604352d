import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from oldlogits.core.engine import EngineSpec, RolloutEngine, Sampling, Span
from oldlogits.core.engine_stats import EngineCapabilities
from oldlogits.core.errors import ConfigError, ModelFolderError, WorkerDiedError
from oldlogits.core.weights import FullWeights
from oldlogits.engines.embedded.engine import EngineCore
from oldlogits.engines.embedded.process import EngineProcess

from ..runs import files_of
from ..waiting import HUNG_S, wait_until
from .reference import VOCAB, expected_logprobs, make_model, perturbed, save, weights_of

pytestmark = pytest.mark.slow

CONTEXT = 1200
LONG = Sampling(max_tokens=CONTEXT)
ORIGINAL = weights_of(make_model("qwen3"))
"""The weights of the model folder; the engine of all tests has them as version 0 or 1."""


@pytest.fixture(scope="module")
def model():
    return make_model("qwen3")


@pytest.fixture(scope="module")
def spec(model, tmp_path_factory):
    return EngineSpec(model_path=save(model, tmp_path_factory.mktemp("model")), max_num_seqs=8, max_context=CONTEXT)


@pytest.fixture(scope="module")
def shared_engine(spec):
    engine = EngineProcess(spec)
    yield engine
    engine.close()


@pytest.fixture
def own_engine(spec, shared_files):
    files = shared_files()
    engine = EngineProcess(spec)
    yield engine
    engine.close()
    assert shared_files() <= files


def is_alive(pid):
    """Whether the process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def start(engine, *names, sampling=LONG):
    return {name: asyncio.create_task(engine.generate([3, 1, 4], sampling, name)) for name in names}


async def until_sampling(engine):
    """Wait until every request has some tokens; leaves the engine paused."""
    while True:
        await engine.pause("keep", "recompute")
        if all(partial.output_ids for partial in (await engine.partials()).values()):
            return
        await engine.resume()


def test_the_process_samples_what_the_core_samples(own_engine, spec):
    core = EngineCore(spec)
    core.add("a", [3, 1, 4], Sampling(max_tokens=40))
    expected = None
    while not core.idle:
        expected = dict(core.step()).get("a")

    async def play():
        await own_engine.ready()
        return await own_engine.generate([3, 1, 4], Sampling(max_tokens=40), "a")

    assert isinstance(own_engine, RolloutEngine)
    assert asyncio.run(play()) == expected
    assert own_engine.capabilities == EngineCapabilities(partials=True, growth=True, num_host_copies=1)


def test_an_update_in_mid_flight_keeps_running_requests_and_tags_their_tokens(shared_engine, model):
    first = weights_of(model)
    new = perturbed(first, 1, 0.05)

    async def play():
        tasks = start(shared_engine, "a", "b", "c")
        await asyncio.sleep(0)
        await until_sampling(shared_engine)
        partials = await shared_engine.partials()
        await shared_engine.update_weights(FullWeights(tensors={**new, "lm_head.weight": new["model.embed_tokens.weight"]}), 1)
        assert len(files_of(os.getpid())) == 1, "the host's copy"
        await shared_engine.resume()
        finished = dict(zip(tasks, await asyncio.gather(*tasks.values()), strict=True))
        stats = await shared_engine.stats()
        await shared_engine.pause("keep", "recompute")
        await shared_engine.update_weights(FullWeights(tensors=first), 1)
        await shared_engine.resume()
        return partials, finished, stats

    partials, finished, stats = asyncio.run(play())
    assert partials.keys() == finished.keys() == {"a", "b", "c"}
    for name, generation in finished.items():
        switch = len(partials[name].output_ids)
        assert generation.output_ids[:switch] == partials[name].output_ids
        assert generation.spans == (Span(version=0, start=0, end=switch), Span(version=1, start=switch, end=CONTEXT - 3))
        expected = expected_logprobs(model, {0: first, 1: new}, [3, 1, 4], generation)
        assert list(generation.logprobs) == pytest.approx(expected, abs=2e-5)
    assert stats.version == 1
    assert stats.num_decode_tokens >= 3 * (CONTEXT - 3)
    assert stats.busy_s > 0


async def conversation(engine, num_turns, read, *, name):
    """The generations of turns, each of which goes on from the one before, and its prompt."""
    prompt, played = [3, 1, 4], []
    for turn in range(num_turns):
        generation = await engine.generate(prompt, Sampling(max_tokens=5), f"{name}/{turn}")
        played.append((prompt, generation))
        prompt = [*prompt, *generation.output_ids, *read]
    return played


@pytest.fixture
def calls(shared_engine, monkeypatch):
    """The arguments of every call to generate."""
    seen, call = [], shared_engine._process.call

    async def watched(method, arguments):
        seen.extend([arguments] if method == "generate" else [])
        return await call(method, arguments)

    monkeypatch.setattr(shared_engine._process, "call", watched)
    return seen


def test_a_turn_sends_the_tokens_after_the_last_prompt_of_its_trajectory_and_samples_as_over_the_whole(
    shared_engine, model, calls
):
    played = asyncio.run(conversation(shared_engine, 4, [2, 7], name="grows"))
    sent = [list(arguments[-1]) for arguments in calls]
    expected = [played[0][0]] + [[*before.output_ids, 2, 7] for _, before in played[:-1]]
    assert sent == expected
    for prompt, generation in played:
        logps = expected_logprobs(model, {0: ORIGINAL, 1: ORIGINAL}, prompt, generation)
        assert list(generation.logprobs) == pytest.approx(logps, abs=2e-5)


def test_where_the_process_has_forgotten_a_prompt_or_the_turn_goes_on_from_another_one_the_whole_is_sent(
    shared_engine, model, calls
):
    async def play():
        await shared_engine.generate([3, 1, 4, 1], Sampling(max_tokens=2), "lost/0")
        tokens, _ = shared_engine._prompts.take("lost")
        shared_engine._prompts.keep("lost", tokens, 10**6)  # a number that the process never saw
        gone = await shared_engine.generate([3, 1, 4, 1, 5], Sampling(max_tokens=2), "lost/1")
        other = await shared_engine.generate([9, 9], Sampling(max_tokens=2), "lost/2")
        return [([3, 1, 4, 1, 5], gone), ([9, 9], other)]

    played = asyncio.run(play())
    assert [list(arguments[-1]) for arguments in calls] == [[3, 1, 4, 1], [5], [3, 1, 4, 1, 5], [9, 9]]
    for prompt, generation in played:
        logps = expected_logprobs(model, {0: ORIGINAL, 1: ORIGINAL}, prompt, generation)
        assert list(generation.logprobs) == pytest.approx(logps, abs=2e-5)


def test_a_request_that_is_aborted_while_its_prompt_is_asked_for_ends_without_a_token(shared_engine, calls):
    async def play():
        await shared_engine.generate([3, 1, 4, 1], Sampling(max_tokens=2), "away/0")
        tokens, _ = shared_engine._prompts.take("away")
        shared_engine._prompts.keep("away", tokens, 10**6)
        asked = asyncio.create_task(shared_engine.generate([3, 1, 4, 1, 5], LONG, "away/1"))
        await asyncio.sleep(0)
        await shared_engine.abort("away/1")
        return await asked

    generation = asyncio.run(play())
    assert (generation.output_ids, generation.finish_reason) == ((), "abort")
    assert len(calls) == 2, "nothing was sent again"


def test_a_turn_that_is_cancelled_leaves_the_next_one_right(shared_engine, model):
    async def play():
        await shared_engine.generate([3, 1, 4], Sampling(max_tokens=2), "again/0")
        cancelled = asyncio.create_task(shared_engine.generate([3, 1, 4, 1], LONG, "again/1"))
        await asyncio.sleep(0)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        return await shared_engine.generate([3, 1, 4, 1, 5], Sampling(max_tokens=4), "again/2")

    generation = asyncio.run(play())
    logps = expected_logprobs(model, {0: ORIGINAL, 1: ORIGINAL}, [3, 1, 4, 1, 5], generation)
    assert list(generation.logprobs) == pytest.approx(logps, abs=2e-5)


def test_abort_and_cancel_free_the_engine_and_abort_returns_the_partial(shared_engine):
    async def play():
        tasks = start(shared_engine, "aborted", "cancelled")
        await asyncio.sleep(0)
        await until_sampling(shared_engine)
        expected = (await shared_engine.partials())["aborted"]
        await shared_engine.abort("aborted")
        await shared_engine.abort("never heard of")
        tasks["cancelled"].cancel()
        assert await tasks["aborted"] == expected
        assert expected.finish_reason == "abort"
        assert await shared_engine.partials() == {}
        with pytest.raises(asyncio.CancelledError):
            await tasks["cancelled"]
        await shared_engine.resume()

    asyncio.run(play())


def test_pause_with_abort_ends_every_request_before_it_returns(shared_engine):
    async def play():
        tasks = start(shared_engine, *map(str, range(10)))  # more than slots
        await asyncio.sleep(0)
        await shared_engine.pause("abort", "recompute")
        generations = await asyncio.gather(*tasks.values())
        assert {generation.finish_reason for generation in generations} == {"abort"}
        late = asyncio.create_task(shared_engine.generate([1], Sampling(max_tokens=2), "late"))
        await asyncio.sleep(0.05)
        assert not late.done()
        await shared_engine.resume()
        assert len((await late).output_ids) == 2

    asyncio.run(play())


def test_errors_of_the_engine_come_back_as_what_they_are_and_it_lives_on(shared_engine):
    async def play():
        for ids in ([], [VOCAB], [1] * CONTEXT):
            with pytest.raises(ConfigError):
                await shared_engine.generate(ids, LONG, "a")
        with pytest.raises(ConfigError, match="only between pause and resume"):
            await shared_engine.update_weights(FullWeights(tensors={"x": torch.zeros(1)}), 1)
        await shared_engine.pause("keep", "recompute")
        with pytest.raises(ModelFolderError, match=r"model\.embed_tokens\.weight: missing"):
            await shared_engine.update_weights(FullWeights(tensors={"x": torch.zeros(1)}), 1)
        assert len(files_of(os.getpid())) == 1, "the host's copy, written anew"
        task = asyncio.create_task(shared_engine.generate([1], Sampling(max_tokens=2), "twice"))
        await asyncio.sleep(0)
        with pytest.raises(ConfigError, match="in use; got: twice"):
            await shared_engine.generate([1], LONG, "twice")
        await shared_engine.resume()
        assert len((await task).output_ids) == 2

    asyncio.run(play())


def test_a_killed_engine_fails_pending_and_later_calls(own_engine):
    async def play():
        tasks = start(own_engine, *map(str, range(5)))
        await own_engine.ready()
        os.kill(own_engine._process.pid, signal.SIGSTOP)  # in the middle of its work
        paused = asyncio.create_task(own_engine.pause("keep", "recompute"))
        await asyncio.sleep(0)
        os.kill(own_engine._process.pid, signal.SIGKILL)
        for result in await asyncio.gather(*tasks.values(), paused, return_exceptions=True):
            assert isinstance(result, WorkerDiedError)
            assert "exit code -9" in str(result)
        with pytest.raises(WorkerDiedError, match="exit code -9"):
            await own_engine.generate([1], LONG, "later")
        with pytest.raises(WorkerDiedError, match="exit code -9"):
            await own_engine.resume()

    asyncio.run(play())


def test_an_engine_that_stops_answering_is_killed_after_the_time_out(spec):
    engine = EngineProcess(spec, control_timeout_s=HUNG_S)
    pid = engine._process.pid

    async def play():
        await engine.ready()
        engine._deadline.timeout_s = 0.2
        os.kill(pid, signal.SIGSTOP)
        task = asyncio.create_task(engine.generate([1], LONG, "a"))
        await asyncio.sleep(0)
        with pytest.raises(WorkerDiedError, match=r"no answer to stats within 0\.2 s"):
            await engine.stats()
        with pytest.raises(WorkerDiedError, match="no answer to stats"):
            await task

    asyncio.run(play())
    engine.close()
    assert not is_alive(pid)


def test_closing_ends_the_process_and_fails_what_is_pending(spec, shared_files):
    files = shared_files()
    engine = EngineProcess(spec)
    pid = engine._process.pid

    async def play():
        await engine.ready()
        os.kill(pid, signal.SIGINT)  # Ctrl-C reaches the whole group: the parent decides
        tasks = start(engine, "a")
        await asyncio.sleep(0)
        await engine.stats()
        engine.close()
        with pytest.raises(WorkerDiedError, match="it was closed"):
            await tasks["a"]
        with pytest.raises(WorkerDiedError, match="it was closed"):
            await engine.stats()

    asyncio.run(play())
    engine.close()
    assert not is_alive(pid)
    assert shared_files() <= files


def test_an_engine_does_not_outlive_its_parent(spec):
    script = f"""
import asyncio, os
from oldlogits.engines.embedded.process import EngineProcess
from oldlogits.core.engine import EngineSpec
if __name__ == "__main__":
    engine = EngineProcess({spec!r})
    asyncio.run(engine.ready())
    print(engine._process.pid, flush=True)
    os.kill(os.getpid(), 9)
"""
    path = Path(spec.model_path) / "parent.py"
    path.write_text(script)
    result = subprocess.run([sys.executable, str(path)], stdout=subprocess.PIPE, timeout=HUNG_S, check=False)
    assert result.returncode == -signal.SIGKILL
    pid = int(result.stdout)
    wait_until(lambda: not is_alive(pid), "the engine has ended")


def test_a_folder_without_a_model_is_refused_before_a_process_starts(tmp_path):
    with pytest.raises(ModelFolderError, match=r"no config\.json"):
        EngineProcess(EngineSpec(model_path=str(tmp_path)))


def test_a_folder_without_weights_fails_the_first_call_with_its_own_error(spec, tmp_path):
    (tmp_path / "config.json").write_bytes((Path(spec.model_path) / "config.json").read_bytes())
    engine = EngineProcess(EngineSpec(model_path=str(tmp_path), max_context=CONTEXT))
    with pytest.raises(ModelFolderError, match=r"no model\.safetensors in"):
        asyncio.run(engine.ready())
    engine.close()


def test_what_running_turns_have_sampled_since_is_told_while_the_engine_samples(shared_engine):
    """After so many tokens of the turns that are asked for, and bit for bit what the turns have in the end."""

    async def play():
        tasks = start(shared_engine, "a/0", "b/1", "c/0")
        pieces = {"a": [], "b": []}
        while min(map(len, pieces.values())) < 2 and not any(task.done() for task in tasks.values()):
            known = {name: sum(len(piece.output_ids) for piece in found) for name, found in pieces.items()}
            grown = await shared_engine.grown(known)
            assert grown.keys() <= {"a/0", "b/1"}
            for request, piece in grown.items():
                pieces[request[0]] += [piece] if piece.output_ids else []
        return pieces, dict(zip(tasks, await asyncio.gather(*tasks.values()), strict=True))

    pieces, finished = asyncio.run(play())
    for request in ("a/0", "b/1"):
        ids, logprobs = finished[request].output_ids, finished[request].logprobs
        found = pieces[request[0]]
        num = sum(len(piece.output_ids) for piece in found)
        assert tuple(id for piece in found for id in piece.output_ids) == ids[:num]
        assert tuple(logp for piece in found for logp in piece.logprobs) == logprobs[:num]
        version = finished[request].spans[0].version
        assert all(piece.spans == (Span(version=version, start=0, end=len(piece.output_ids)),) for piece in found)
