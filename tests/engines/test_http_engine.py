"""The engine over servers, against servers that do exactly what a test says: token i of a sequence is i, its log-prob -i."""

import asyncio
from contextlib import asynccontextmanager

import pytest
import torch

from oldlogits.core.engine import EngineSpec, Generation, RolloutEngine, Sampling, Span, Timeouts
from oldlogits.core.errors import ConfigError, WorkerDiedError
from oldlogits.core.server import GenerateRequest, ServerFailedError, ServerInfo, ServerProtocol
from oldlogits.core.weights import FullWeights
from oldlogits.engines.http.engine import HttpEngine
from oldlogits.engines.http.fleet import SLACK
from oldlogits.engines.http.replica import Replica

from ..waiting import HUNG_S

STARTING = -1
SPEC = EngineSpec(model_path="", max_context=50)
PATIENCE = Timeouts(recover_s=60, request_s=60, control_s=0.5, poll_s=0.01)
HASTY = Timeouts(recover_s=0.3, request_s=0.2, control_s=0.5, poll_s=0.01)


class Running:
    def __init__(self, request):
        self.request, self.tokens, self.versions, self.done = request, [], [], asyncio.get_running_loop().create_future()

    def end(self, reason):
        spans = []
        for i, version in enumerate(self.versions):
            if spans and spans[-1].version == version:
                spans[-1] = Span(version=version, start=spans[-1].start, end=i + 1)
            else:
                spans.append(Span(version=version, start=i, end=i + 1))
        if not self.done.done():
            prompt = tuple(-float(i) for i in self.request.token_ids[1:]) if self.request.sampling.prompt_logprobs else ()
            logprobs = tuple(-float(token) for token in self.tokens)
            self.done.set_result(
                Generation(
                    output_ids=tuple(self.tokens),
                    logprobs=logprobs,
                    spans=tuple(spans),
                    finish_reason=reason,
                    prompt_logprobs=prompt,
                )
            )


class FakeServer(ServerProtocol):
    """Samples when told to; `fails` holds the names of calls that fail, `hangs` of those that never return."""

    def __init__(self, url="http://fake"):
        self._url, self.has = url, STARTING
        self.running, self.log = {}, []
        self.fails, self.hangs = set(), set()
        self.max_context = 100
        self.num_tokens = 7  # of somebody before

    @property
    def url(self):
        return self._url

    async def _called(self, name):
        self.log.append(name)
        if name in self.hangs:
            await asyncio.Event().wait()
        if name in self.fails:
            raise ServerFailedError(f"{name} failed")

    async def close(self):
        pass

    async def connect(self):
        await self._called("connect")
        kind = {"version": "0.32", "arithmetic": "fp32", "numerics": "fp32", "adapter_scale": 0.0}
        return ServerInfo(max_context=self.max_context, **kind)

    async def generate(self, request):
        await self._called("generate")
        self.running[request.request_id] = running = Running(request)
        try:
            return await running.done
        finally:
            del self.running[request.request_id]

    def sample(self, num=1):
        for running in list(self.running.values()):
            for _ in range(num):
                if len(running.tokens) < running.request.sampling.max_tokens:
                    running.tokens.append(len(running.request.token_ids) + len(running.tokens))
                    running.versions.append(self.has)
                    self.num_tokens += 1
            if len(running.tokens) == running.request.sampling.max_tokens:
                running.end("length")

    async def abort(self, ids):
        await self._called("abort")
        for name in ids:
            if name in self.running:
                self.running[name].end("abort")

    async def pause(self, mode):
        await self._called("pause")
        if mode == "abort":
            for running in list(self.running.values()):
                running.end("abort")

    async def resume(self):
        await self._called("resume")

    async def update(self, weights):
        await self._called("update")
        self.has = weights.version

    async def version(self):
        return self.has

    async def check_health(self, timeout_s):
        await self._called("health")

    async def num_sampled(self, timeout_s):
        return self.num_tokens


@asynccontextmanager
async def engine_over(*servers, timeouts=PATIENCE):
    """Started, with version 0, and watched."""
    engine = HttpEngine([Replica(server=s) for s in servers], SPEC, timeouts)
    assert isinstance(engine, RolloutEngine)
    engine.incidents = []
    engine.fleet.listen = engine.incidents.append
    await engine.start()
    await update(engine, 0)
    watching = asyncio.create_task(engine.supervise())
    try:
        yield engine
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        await engine.close()


async def update(engine, version, between=None):
    await engine.pause("keep", "recompute")
    if between is not None:
        await between()
    await engine.update_weights(FullWeights(tensors={"w": torch.zeros(1)}), version)
    await engine.resume()


def ask(engine, name="t/0", max_tokens=6, prompt=(0, 1, 2)):
    return asyncio.create_task(engine.generate(list(prompt), Sampling(max_tokens=max_tokens), name))


async def until(condition):
    async with asyncio.timeout(HUNG_S):
        while not condition():
            await asyncio.sleep(0.002)


def check_whole(generation, *versions, max_tokens=6):
    """All tokens once and in order, each with its log-prob, and the versions that sampled how many."""
    assert generation.output_ids == tuple(range(3, 3 + max_tokens))
    assert generation.logprobs == tuple(-float(i) for i in generation.output_ids)
    assert [(span.version, span.end - span.start) for span in generation.spans] == list(versions)
    assert generation.finish_reason == "length"


def test_a_request_goes_through_an_update_with_one_span_a_version():
    async def play():
        server = FakeServer()
        async with engine_over(server) as engine:
            asked = ask(engine)
            await until(lambda: server.running)
            server.sample(2)
            await update(engine, 1)
            server.sample(4)
            check_whole(await asked, (0, 2), (1, 4))
            assert server.log.count("generate") == 1

    asyncio.run(play())


def test_partials_are_aborted_kept_and_sent_again_after_the_update():
    async def play():
        server = FakeServer()
        async with engine_over(server) as engine:
            asked = ask(engine)
            await until(lambda: server.running)
            server.sample(2)
            found = {}

            async def look():
                found.update(await engine.partials())

            await update(engine, 1, look)
            assert found["t/0"].output_ids == (3, 4)
            assert found["t/0"].spans == (Span(version=0, start=0, end=2),)
            await until(lambda: server.running)
            [running] = server.running.values()
            assert running.request.token_ids == (0, 1, 2, 3, 4)
            assert running.request.sampling.max_tokens == 4
            server.sample(4)
            check_whole(await asked, (0, 2), (1, 4))

    asyncio.run(play())


def test_requests_go_to_the_server_with_the_fewest_and_probes_to_one_after_the_other():
    async def play():
        first, second = FakeServer("http://a"), FakeServer("http://b")
        async with engine_over(first, second) as engine:
            asked = [ask(engine, f"t{i}/0") for i in range(4)]
            await until(lambda: len(first.running) == len(second.running) == 2)
            second.sample(6)
            await until(lambda: not second.running)
            asked += [ask(engine, "t4/0")]
            await until(lambda: len(second.running) == 1)
            probes = Sampling(max_tokens=1, prompt_logprobs=True)
            probed = [asyncio.create_task(engine.generate([0, 1, 2], probes, f"probe/{i}")) for i in range(2)]
            await until(lambda: len(first.running) == 3 and len(second.running) == 2)
            for server in (first, second):
                server.sample(6)
            assert [(await probe).prompt_logprobs for probe in probed] == [(-1.0, -2.0)] * 2
            for request in asked:
                check_whole(await request, (0, 6))

    asyncio.run(play())


def test_the_next_turn_goes_where_the_last_one_was_unless_that_server_is_much_busier():
    async def play():
        first, second = FakeServer("http://a"), FakeServer("http://b")
        async with engine_over(first, second) as engine:
            asked = [ask(engine, "t/0")]
            await until(lambda: len(first.running) == 1)
            first.sample(6)
            check_whole(await asked.pop(), (0, 6))
            others = [ask(engine, f"o{i}/0") for i in range(2 * SLACK)]
            await until(lambda: len(first.running) == len(second.running) == SLACK)
            second.sample(6)
            await until(lambda: not second.running)
            asked = [ask(engine, "t/1")]
            await until(lambda: len(first.running) == SLACK + 1)
            asked += [ask(engine, "t/2")]
            await until(lambda: len(second.running) == 1)
            for server in (first, second):
                server.sample(6)
            for request in [*asked, *others]:
                check_whole(await request, (0, 6))

    asyncio.run(play())


def test_of_a_server_that_dies_the_requests_go_on_elsewhere_with_what_they_kept():
    async def play():
        first, second = FakeServer("http://a"), FakeServer("http://b")
        async with engine_over(first, second) as engine:
            asked = ask(engine)
            await until(lambda: first.running)
            first.sample(2)
            await update(engine, 1, engine.partials)
            await until(lambda: first.running)
            first.sample(1)  # never reaches the run
            await until(lambda: engine.fleet.replicas[0].num_sampled == first.num_tokens)
            first.fails |= {"health", "generate", "connect"}
            await until(lambda: second.running)
            [running] = second.running.values()
            assert running.request.token_ids == (0, 1, 2, 3, 4)
            second.sample(4)
            check_whole(await asked, (0, 2), (1, 4))
            [down] = engine.incidents
            assert (down.what, down.server, down.num_requests, down.num_kept_tokens) == ("down", "http://a", 1, 2)
            assert down.num_lost_tokens == 1

    asyncio.run(play())


def test_a_server_that_fails_in_mid_update_gets_the_weights_when_it_is_back():
    async def play():
        first, second = FakeServer("http://a"), FakeServer("http://b")
        async with engine_over(first, second) as engine:
            first.fails |= {"update"}
            await update(engine, 1)
            assert engine.fleet.up[0].server is second
            first.fails.clear()
            await until(lambda: len(engine.fleet.up) == 2)
            assert first.has == second.has
            assert [incident.what for incident in engine.incidents] == ["down", "up"]
            assert "was given version 1" in engine.incidents[1].reason

    asyncio.run(play())


def test_tokens_of_weights_that_are_not_this_runs_are_thrown_away_and_the_server_is_given_the_right_ones():
    async def play():
        server = FakeServer()
        async with engine_over(server) as engine:
            asked = ask(engine)
            await until(lambda: server.running)
            server.has = STARTING  # it was started again, unseen
            server.sample(6)
            await until(lambda: server.has == 0 and server.running)
            server.sample(6)
            check_whole(await asked, (0, 6))
            assert "no version of this run" in engine.incidents[0].reason

    asyncio.run(play())


def test_a_server_whose_log_probs_are_not_those_of_the_last_probe_does_not_come_back():
    async def play():
        server = FakeServer()
        async with engine_over(server) as engine:
            probed = asyncio.create_task(engine.generate([0, 1], Sampling(max_tokens=1, prompt_logprobs=True), "probe/0"))
            await until(lambda: server.running)
            server.sample()
            await probed
            engine.fleet.fail(engine.fleet.replicas[0], "a test says so")
            await until(lambda: server.running)
            [running] = server.running.values()
            running.request = GenerateRequest(
                request_id="x", token_ids=(0, 9), sampling=Sampling(max_tokens=1, prompt_logprobs=True)
            )
            running.tokens, running.versions = [1], [server.has]
            running.end("length")
            await asyncio.sleep(0.05)
            assert not engine.fleet.up

    asyncio.run(play())


def test_a_request_that_runs_too_long_is_sent_again_with_what_it_has():
    async def play():
        server = FakeServer()
        async with engine_over(server, timeouts=HASTY) as engine:
            slow, quick = ask(engine, "slow/0"), []
            await until(lambda: server.running)
            server.sample(2)
            while server.log.count("abort") == 0:  # others are answered all the while
                quick.append(ask(engine, f"quick/{len(quick)}", max_tokens=1))
                await asyncio.sleep(0.02)
                for running in list(server.running.values()):
                    if running.request.sampling.max_tokens == 1:
                        running.tokens, running.versions = [3], [server.has]
                        running.end("length")
            await until(lambda: any(len(r.request.token_ids) == 5 for r in server.running.values()))
            server.sample(4)
            check_whole(await slow, (0, 6))
            await asyncio.gather(*quick)
            assert engine.incidents == []

    asyncio.run(play())


def test_a_server_that_answers_no_request_counts_as_hung():
    async def play():
        first, second = FakeServer("http://a"), FakeServer("http://b")
        async with engine_over(first, second, timeouts=HASTY) as engine:
            first.hangs |= {"generate", "abort", "connect"}
            asked = ask(engine)
            await until(lambda: second.running)
            second.sample(6)
            check_whole(await asked, (0, 6))
            assert "1 requests hang" in engine.incidents[0].reason

    asyncio.run(play())


def test_a_server_that_comes_back_as_one_that_cannot_be_used_is_left_out_until_it_can():
    async def play():
        first, second = FakeServer("http://a"), FakeServer("http://b")
        async with engine_over(first, second) as engine:
            first.max_context = 10
            engine.fleet.fail(engine.fleet.replicas[0], "a test says so")
            await until(lambda: first.log.count("connect") >= 3)
            assert [replica.server for replica in engine.fleet.up] == [second]
            first.max_context = 100
            await until(lambda: len(engine.fleet.up) == 2)

    asyncio.run(play())


def test_a_pause_that_hangs_does_not_hold_the_update():
    """The server's own client gives up after its control timeout; here it fails at once."""

    async def play():
        first, second = FakeServer("http://a"), FakeServer("http://b")
        async with engine_over(first, second) as engine:
            first.fails |= {"pause", "connect"}
            await update(engine, 1)
            assert [replica.server for replica in engine.fleet.up] == [second]
            assert second.has == 1

    asyncio.run(play())


@pytest.mark.slow
def test_without_any_server_the_run_waits_so_long_and_then_every_request_fails():
    async def play():
        server = FakeServer()
        async with engine_over(server, timeouts=HASTY) as engine:
            server.fails |= {"health", "connect", "generate"}
            asked = [ask(engine, f"t/{i}") for i in range(3)]
            outcomes = await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), HUNG_S)
            assert {type(outcome) for outcome in outcomes} == {WorkerDiedError}
            with pytest.raises(WorkerDiedError, match=r"http://fake: connect failed.*engine\.recover_s = 0\.3 s"):
                await ask(engine, "t/9")

    asyncio.run(play())


def test_an_aborted_request_returns_what_it_has():
    async def play():
        server = FakeServer()
        async with engine_over(server) as engine:
            asked = ask(engine)
            await until(lambda: server.running)
            server.sample(2)
            await engine.abort("t/0")
            generation = await asked
            assert (generation.output_ids, generation.finish_reason) == ((3, 4), "abort")
            await engine.abort("t/0")  # it is over: nothing happens
            other = ask(engine, "u/0")
            await until(lambda: server.running)
            server.sample(1)
            await engine.pause("abort", "recompute")
            assert (await other).finish_reason == "abort"

    asyncio.run(play())


def test_what_the_engine_cannot_do_is_refused():
    async def play():
        server = FakeServer()
        async with engine_over(server) as engine:
            for call in (
                engine.pause("keep", "stale"),
                engine.update_weights(FullWeights(tensors={}), 1),
                engine.generate([0] * 50, Sampling(max_tokens=1), "a/0"),
            ):
                with pytest.raises(ConfigError):
                    await call
        cold = HttpEngine([Replica(server=server)], SPEC, PATIENCE)
        with pytest.raises(ConfigError, match="no weights"):
            await cold.generate([0], Sampling(max_tokens=1), "a/0")
        for arguments in ({"max_context": 101, "numerics": "fp32"}, {"max_context": 50, "numerics": "fp8"}):
            with pytest.raises(ConfigError):
                await HttpEngine([Replica(server=server)], EngineSpec(model_path="", **arguments), PATIENCE).start()

    asyncio.run(play())
