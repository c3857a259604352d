"""The experts that an engine says it chose: transformers' routers with the same weights are the oracle."""

import asyncio
import base64
import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from oldlogits.core.engine import EngineSpec, Generation, Sampling, ServerOptions, Span
from oldlogits.core.errors import ConfigError
from oldlogits.core.server import GenerateRequest, LaunchSpec, ServerInfo
from oldlogits.core.trajectory import Routing
from oldlogits.engines.embedded.engine import EngineCore
from oldlogits.engines.http.engine import HttpEngine
from oldlogits.engines.http.pending import PendingRequest
from oldlogits.engines.http.replica import Replica
from oldlogits.engines.protocols import vllm_messages as wire
from oldlogits.engines.protocols.embedded import EmbeddedProtocol
from oldlogits.engines.protocols.vllm import VllmProtocol
from oldlogits.models.routing import routers_of

from .reference import EXPERTS, SHAPE, VOCAB, load, make_model, perturbed, save, weights_of
from .test_http_engine import PATIENCE, SPEC, FakeServer, ask, until
from .test_http_engine import update as over_http

MIXTURE = "qwen3 top-2 of 4 experts"
IDS = torch.randint(VOCAB, (90,), generator=torch.Generator().manual_seed(0)).tolist()


@torch.no_grad()
def chosen_by(model, weights, ids):
    """[token, layer, expert]: whether a full forward with these weights lets an expert serve a token."""
    seen = {}

    def noting(layer):
        def note(module, args, out):
            seen[layer] = out[-1]

        return note

    hooks = [router.register_forward_hook(noting(layer)) for layer, router in routers_of(model).items()]
    load(model, weights)(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return as_mask(torch.stack([seen[layer] for layer in sorted(seen)], 1).numpy(), model.config.num_experts)


def as_mask(choices, num=4):
    return (choices[..., None] == np.arange(num)).any(-2)


@pytest.fixture(scope="module")
def model():
    return make_model(MIXTURE)


@pytest.fixture(scope="module")
def versions(model, tmp_path_factory):
    weights = weights_of(model)
    return {0: weights, 1: perturbed(weights, 1, 0.3), 2: perturbed(weights, 2, 0.3)}


@pytest.fixture
def core(model, versions, tmp_path):
    return EngineCore(
        EngineSpec(model_path=save(load(model, versions[0]), tmp_path), max_num_seqs=3, max_context=96, returns_routing=True)
    )


def update(core, weights, version, kv="recompute"):
    core.pause("keep", kv)
    core.update_weights(weights, version)
    core.resume()


def finish(core):
    finished = {}
    while not core.idle:
        finished.update(core.step())
    return finished


def test_each_version_tells_the_experts_of_all_tokens_that_it_read_shared_ones_included(core, model, versions):
    group = {f"g.{i}/0": IDS[: 40 + (i == 3)] for i in range(4)}  # a prompt that others have computed; one waits
    for name, ids in group.items():
        core.add(name, ids, Sampling(max_tokens=12))
    for version in (1, 2):
        for _ in range(4):
            assert not core.step()
        update(core, versions[version], version)
    finished = finish(core)
    assert core.stats.num_prefix_hit_tokens > 100
    for name, ids in group.items():
        spans = finished[name].spans
        assert spans[-1].version == 2
        whole = [*ids, *finished[name].output_ids]
        for span in spans:
            num = len(ids) + span.end - 1
            expected = chosen_by(model, versions[span.version], whole[:num])
            assert np.array_equal(as_mask(span.routing.choices), expected)
            assert span.routing.choices.shape == (num, 2, 2)
    assert [span.version for span in finished["g.0/0"].spans] == [0, 1, 2]


def test_a_next_turn_tells_them_of_the_turns_before_it_too(core, model, versions):
    core.add("t/0", IDS[:20], Sampling(max_tokens=5))
    first = finish(core)["t/0"]
    ids = [*IDS[:20], *first.output_ids, *IDS[20:30]]
    core.add("t/1", ids, Sampling(max_tokens=5))
    [span] = finish(core)["t/1"].spans
    assert core.stats.num_prefix_hit_tokens >= 20
    assert len(span.routing) == len(ids) + 4
    assert np.array_equal(as_mask(span.routing.choices)[: len(ids)], chosen_by(model, versions[0], ids))


def test_over_kept_entries_the_experts_are_those_of_the_versions_that_computed_them(core, model, versions):
    core.add("t/0", IDS[:20], Sampling(max_tokens=10))
    for _ in range(6):
        core.step()
    update(core, versions[1], 1, "stale")
    old, new = finish(core)["t/0"].spans
    assert (old.kv, new.kv) == ("fresh", "mixed")
    assert len(old.routing) == 20 + 6 - 1
    assert len(new.routing) == 20 + 10 - 1
    assert new.routing.choices[: len(old.routing)].tolist() == old.routing.choices.tolist()
    whole = chosen_by(model, versions[0], IDS[:20])
    assert np.array_equal(as_mask(new.routing.choices)[:20], whole)


@pytest.mark.parametrize("kv", ["recompute", "stale"])
def test_what_is_told_of_a_running_turn_goes_on_from_what_is_known(core, versions, kv):
    core.add("t/0", IDS[:10], Sampling(max_tokens=12))
    for version in (1, 2):
        for _ in range(4):
            core.step()
        update(core, versions[version], version, kv)
    core.step()
    whole = core.partials()["t/0"]
    assert [(span.start, span.end) for span in whole.spans] == [(0, 4), (4, 8), (8, 9)]
    for known in range(9):
        told = core.grown({"t": known})["t/0"]
        for span, full in zip(told.spans, [span for span in whole.spans if span.end > known], strict=True):
            begin = 10 + known - 1 if full.start < known else 0
            assert span.routing.choices.tolist() == full.routing.choices[begin:].tolist()


def test_an_engine_tells_none_where_it_is_not_asked_or_chooses_none(model, tmp_path):
    for name, asked in ((MIXTURE, False), ("qwen3", True)):
        core = EngineCore(EngineSpec(model_path=save(make_model(name), tmp_path / name), max_context=32, returns_routing=asked))
        core.add("t/0", IDS[:4], Sampling(max_tokens=3))
        assert [span.routing for span in finish(core)["t/0"].spans] == [None]


def test_more_experts_than_a_byte_tells_apart_take_two(tmp_path):
    shape = {**SHAPE, **EXPERTS, "num_experts": 300, "num_experts_per_tok": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape)).eval()
    for layer in model.model.layers:
        layer.mlp.gate.weight.data[280] = 9 * layer.mlp.gate.weight.data[3].abs() + 1
    core = EngineCore(EngineSpec(model_path=save(model, tmp_path), max_num_seqs=1, max_context=64, returns_routing=True))
    core.add("t/0", IDS[:30], Sampling(max_tokens=4))
    generation = finish(core)["t/0"]
    [span] = generation.spans
    expected = chosen_by(model, weights_of(model), [*IDS[:30], *generation.output_ids[:-1]])
    assert span.routing.choices.dtype == np.uint16
    assert np.array_equal(as_mask(span.routing.choices, 300), expected)
    assert expected[..., 280].any()


REQUEST = GenerateRequest(request_id="a", token_ids=(3, 1), sampling=Sampling(max_tokens=2))


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return base64.b64encode(file.getvalue()).decode()


def answer_of(routed, *versions):
    """An answer as vLLM 0.32 writes it, of a token for each version."""
    ids = list(range(len(versions)))
    choice = {
        "token_ids": ids,
        "finish_reason": "length",
        "weight_versions": [{"version": str(v), "start": i, "end": i + 1} for i, v in enumerate(versions)],
        "logprobs": {"content": [{"token_id": i, "logprob": -1.0} for i in ids]},
        "routed_experts": routed,
    }
    return wire.read(wire.AnswerBody, json.dumps({"choices": [choice]}).encode()).answer(REQUEST, int)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int32])
def test_the_experts_of_vllm_are_read_value_by_value_and_are_those_of_its_newest_weights(kind):
    found = np.arange(3 * 4 * 2).reshape(3, 4, 2).astype(kind)
    old, new = answer_of(npy(found), 4, 5).spans
    assert old.routing is None
    assert new.routing.choices.tolist() == found.tolist()
    assert new.routing.id_bytes == (1 if kind is np.uint8 else 2)
    assert answer_of(None, 4, 5).spans[1].routing is None


def test_what_is_no_array_of_experts_is_refused():
    good = np.zeros((3, 4, 2), np.uint8)
    file = io.BytesIO()
    np.save(file, np.array([{}], object), allow_pickle=True)
    pickled = base64.b64encode(file.getvalue()).decode()
    bad = ["%%%", "aGVsbG8=", "", npy(good)[:-20], pickled, npy(good.astype(float)), npy(good[:2]), npy(good[0])]
    bad += [npy(good.astype(np.int32) - 1), npy(good.astype(np.int32) + 70_000), npy(good[:, :0])]
    for routed in bad:
        with pytest.raises(ConfigError, match="routed_experts"):
            answer_of(routed, 4, 5)


def test_routing_survives_the_json_of_oldlogits_serve():
    found = np.arange(3 * 4 * 2, dtype=np.uint8).reshape(3, 4, 2)
    answer = answer_of(npy(found), 4, 4)
    answer = replace(answer, spans=(Span(version=4, start=0, end=2, routing=Routing.of(found)),))
    body = wire.AnswerBody.of(answer, REQUEST, model="m", labels={4: "4"})
    assert wire.read(wire.AnswerBody, body.model_dump_json().encode()).answer(REQUEST, int) == answer


def piece(num_before, num, version):
    """An answer to a request of so many tokens: each token's experts are its position."""
    found = np.tile(np.arange(num_before + num - 1, dtype=np.uint8)[:, None, None], (1, 2, 1)) + 100 * version
    span = Span(version=version, start=0, end=num, routing=Routing.of(found.astype(np.uint8)))
    return Generation(output_ids=(0,) * num, logprobs=(-1.0,) * num, spans=(span,), finish_reason="abort")


def test_a_request_that_is_sent_again_keeps_the_experts_of_each_version():
    request = PendingRequest(id="t/0", prompt_ids=[0] * 5, sampling=Sampling(max_tokens=9))
    for num_before, num, version in ((5, 2, 0), (7, 3, 0), (10, 1, 1), (11, 2, 1)):
        request.keep(piece(num_before, num, version))
    first, second = request.kept.spans
    assert first.routing.choices[:, 0, 0].tolist() == list(range(9))
    assert second.routing.choices[:, 0, 0].tolist() == list(range(100, 112))


def test_a_server_that_does_not_say_what_it_chose_is_refused_where_that_is_needed():
    spec = EngineSpec(model_path="m", max_context=8, returns_routing=True)
    info = ServerInfo(version="0.32", max_context=8, arithmetic="fp32", numerics="fp32", adapter_scale=0.0)
    replica = Replica(server=FakeServer())
    replica.check_fit(replace(info, returns_routing=True), spec)
    replica.check_fit(info, replace(spec, returns_routing=False))
    with pytest.raises(ConfigError, match="--enable-return-routed-experts"):
        replica.check_fit(info, spec)


def test_at_an_update_requests_are_sent_again_so_that_an_answer_has_the_experts_of_one_version():
    class Telling(FakeServer):
        async def connect(self):
            return replace(await super().connect(), returns_routing=True)

    async def play(spec):
        server = Telling()
        engine = HttpEngine([Replica(server=server)], spec, PATIENCE)
        await engine.start()
        await over_http(engine, 0)
        asked = ask(engine)
        await until(lambda: server.running)
        server.sample(2)
        await over_http(engine, 1)
        await until(lambda: server.running)
        server.sample(4)
        generation = await asked
        await engine.close()
        assert [(span.version, span.end) for span in generation.spans] == [(0, 2), (1, 6)]
        return server.log.count("generate")

    assert asyncio.run(play(SPEC)) == 1
    assert asyncio.run(play(replace(SPEC, returns_routing=True))) == 2


def test_servers_of_a_run_are_started_with_the_flag_where_it_needs_their_experts(model, tmp_path):
    path = save(model, tmp_path / "folder")
    for protocol in (VllmProtocol, EmbeddedProtocol):
        for needed in (False, True):
            spec = EngineSpec(model_path=path, max_context=8, returns_routing=needed)
            servers = ServerOptions(protocol="vllm", log_folder=tmp_path / "log")
            command = protocol.command(LaunchSpec(engine=spec, servers=servers), 1)
            assert ("--enable-return-routed-experts" in command) is needed
