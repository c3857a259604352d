"""Recipes with servers: what has no effect or cannot work is refused when the recipe is read."""

import pytest

from oldlogits.config.check import check
from oldlogits.config.load import config_from_table
from oldlogits.core.engine import EngineSpec, ServerOptions
from oldlogits.core.errors import ConfigError
from oldlogits.core.server import LaunchSpec
from oldlogits.engines.protocols.embedded import EmbeddedProtocol

URL = "http://127.0.0.1:8000"


def engine(**keys):
    return config_from_table({"engine": {"type": "vllm", **keys}})


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"precision": "fp8", "flags": ["--enforce-eager"], "num_servers": 2},
        {"urls": [URL, "https://host:1"], "token_env": "TOKEN"},
        {"server": "embedded", "precision": "fp8_dynamic"},
        {"server": "embedded", "urls": [URL]},
    ],
)
def test_what_can_work_passes(keys):
    check(engine(**keys))


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"urls": [URL], "flags": ["--x"]}, "starts no server"),
        ({"urls": [URL], "num_servers": 2}, "starts no server"),
        ({"urls": [URL, URL + "/"]}, "twice"),
        ({"urls": ["127.0.0.1:8000"]}, "names no server"),
        ({"urls": [URL + "/v1"]}, "names no server"),
        ({"urls": ["http://me:secret@127.0.0.1:8000"]}, "names no server"),
        ({"token_env": "TOKEN"}, "token of their own"),
        ({"num_servers": 0}, "num_servers"),
        ({"recover_s": 0.0}, "recover_s"),
        ({"precision": "fp8_dynamic"}, "fp8_dynamic"),
        ({"kv": "stale"}, "are of no version"),
        ({"server": "sglang"}, "vllm, embedded"),
        ({"type": "embedded", "urls": [URL]}, "has no servers"),
    ],
)
def test_what_cannot_work_is_refused(keys, words):
    with pytest.raises(ConfigError, match=words):
        check(engine(**keys))


def test_lockstep_is_not_for_servers():
    config = config_from_table({"engine": {"type": "vllm"}, "runtime": {"type": "lockstep"}})
    with pytest.raises(ConfigError, match=r"runtime\.type = 'local'"):
        check(config)


def test_an_unknown_type_is_refused_with_its_choices():
    with pytest.raises(ConfigError, match="embedded, vllm"):
        check(engine(type="sglang"))


def ray(**sections):
    return config_from_table({"runtime": {"type": "ray"}, **sections})


@pytest.mark.parametrize(
    "keys",
    [{}, {"num_workers": 8, "placement": "STRICT_SPREAD", "address": "auto"}, {"worker_cpus": 0.0, "worker_gpus": 0.5}],
)
def test_a_cluster_that_can_work_passes(keys):
    check(ray(ray=keys))
    check(ray(ray=keys, engine={"type": "vllm", "flags": ["--enforce-eager"]}))


@pytest.mark.parametrize(
    "sections, words",
    [
        ({"ray": {"num_workers": 0}}, r"ray\.num_workers"),
        ({"ray": {"worker_cpus": -1.0}}, r"ray\.worker_cpus"),
        ({"ray": {"trainer_gpus": float("inf")}}, r"ray\.trainer_gpus"),
        ({"ray": {"start_timeout_s": 0.0}}, r"ray\.start_timeout_s"),
        ({"engine": {"type": "vllm", "urls": [URL]}}, "one server of its own"),
        ({"engine": {"type": "vllm", "num_servers": 2}}, "one server of its own"),
        ({"engine": {"kv": "stale"}}, "another worker"),
        ({"trainer": {"device": "cuda"}}, r"ray\.trainer_gpus > 0"),
        ({"runtime": {"type": "local"}, "ray": {"num_workers": 3}}, "no effect without the runtime ray"),
    ],
)
def test_a_cluster_that_cannot_work_is_refused(sections, words):
    with pytest.raises(ConfigError, match=words):
        check(ray(**sections))


@pytest.mark.parametrize(
    "sections, device",
    [
        ({}, "auto"),
        ({"engine": {"device": "cuda"}}, "cuda"),
        ({"runtime": {"type": "lockstep"}}, "cpu"),
        ({"runtime": {"type": "lockstep"}, "engine": {"device": "cuda"}}, "cuda"),
        ({"runtime": {"type": "ray"}}, "cpu"),
        ({"runtime": {"type": "ray"}, "ray": {"worker_gpus": 1.0}}, "auto"),
    ],
)
def test_the_engine_has_a_gpu_where_the_recipe_leaves_it_one(sections, device):
    assert config_from_table(sections).engine_device == device


@pytest.mark.parametrize(
    "sections, word",
    [
        ({"engine": {"type": "vllm", "device": "cpu"}}, "engine.device has no effect"),
        ({"engine": {"type": "vllm", "server": "embedded", "urls": ["http://127.0.0.1:1"], "device": "cpu"}}, "has no effect"),
        ({"runtime": {"type": "ray"}, "engine": {"device": "cuda"}}, "does not reserve for it"),
    ],
)
def test_a_device_that_the_engine_cannot_have_is_refused(sections, word):
    with pytest.raises(ConfigError, match=word):
        check(config_from_table(sections))


def test_a_server_of_the_embedded_engine_is_told_its_device():
    config = config_from_table({"engine": {"type": "vllm", "server": "embedded", "device": "cpu"}})
    check(config)
    spec = EngineSpec(model_path="m", device=config.engine_device)
    words = EmbeddedProtocol.command(LaunchSpec(engine=spec, servers=ServerOptions(protocol="embedded")), 1)
    assert words[words.index("--device") + 1] == "cpu"
