"""A model folder is damaged in every way: each command refuses it with what, got, allowed and fix, and no traceback."""

import json
import random
import shutil
import signal
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from oldlogits.cli.main import run

from ..runs import recipe, write_recipe
from ..waiting import HUNG_S

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123456\n"
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
HARMLESS = frozenset({("generation_config.json", "missing"), ("tokenizer_config.json", "missing")})
DAMAGES = {
    "missing": lambda content: None,
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "pointer": lambda content: POINTER,
    "noise": lambda content: random.Random(0).randbytes(4096),
    "list": lambda content: b"[1, 2]",
    "null": lambda content: b"null",
    "latin-1": lambda content: '{"größe": 1}'.encode("latin-1"),
    "deep": lambda content: b"[" * 100_000,
    "digits": lambda content: b'{"vocab_size": ' + b"9" * 5000 + b"}",
}


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """A copy to damage."""
    return shutil.copytree(tiny_folder, tmp_path / "model")


def refusal(capsys, words):
    """The four parts of what a command says that must be refused."""
    previous = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.alarm(int(HUNG_S))  # a server that was not refused serves until it is interrupted
    try:
        assert run([str(word) for word in words]) == 2, words
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    said = capsys.readouterr().err
    assert "Traceback" not in said
    lines = [line for line in said.splitlines() if line.lstrip().startswith(("error: ", "got: ", "allowed: ", "fix: "))]
    parts = dict(line.strip().split(": ", 1) for line in lines)
    assert list(parts) == ["error", "got", "allowed", "fix"], said
    return parts


def commands(folder, tmp_path, *, heavy=True):
    """The words of every command that reads a model folder."""
    path = tmp_path / "r.toml"
    if not path.exists():
        write_recipe(path, recipe("tiny", env={"target": "desk"}, num_updates=1))
    train = ["train", path, "--model.path", folder, "--env.target", "tests.runs:Words"]
    yield [*train, "--dry-run"]
    yield ["play", path, "--mode", "checkpoint", "--model", folder, "--env.target"][:-1]
    yield [*train, "--out", tmp_path / "run"]
    yield ["bench", "versions", "--model", folder, "--rounds", "1", "--lr", "1e-5"]
    if heavy:
        yield ["serve", folder, "--port", "0"]


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_every_command_refuses_a_folder_with_a_damaged_file(name, damage, folder, tmp_path, capsys):
    content = DAMAGES[damage]((folder / name).read_bytes())
    if (name, damage) in HARMLESS:
        pytest.skip("transformers does without it")
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    for words in commands(folder, tmp_path):
        if "--dry-run" in words and damage == "missing":
            assert run([str(word) for word in words]) == 0, "of a model folder its config.json is enough"
            capsys.readouterr()
            continue
        if words[0] == "serve" and (name, damage) == ("tokenizer.json", "missing"):
            continue  # tokens in, tokens out
        parts = refusal(capsys, words)
        assert str(folder) in parts["got"]
        assert "engine.type" not in parts["fix"]
        if damage == "pointer":
            assert "git lfs pull" in parts["fix"]


def edited(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    config.update(values)
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def stored(folder, change):
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights) or weights, folder / "model.safetensors", metadata={"format": "pt"})


def sharded(folder, *, leave_out=(), shard="model-2.safetensors", also=None):
    """Two shards and their index instead of one file."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    parts = {"model-1.safetensors": names[: len(names) // 2], shard: names[len(names) // 2 :]}
    for file, some in parts.items():
        save_file({name: weights[name] for name in some}, folder / file.rpartition("/")[2], metadata={"format": "pt"})
    places = {name: file for file, some in parts.items() for name in some if name not in leave_out}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {**places, **(also or {})}}))


def header(folder, change):
    """Write the header of the weights anew; the rest stays."""
    content = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    fields = json.loads(content[8 : 8 + length])
    change(fields)
    text = json.dumps(fields).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def longer(path):
    path.write_bytes(path.read_bytes() + b"more")


NORM, UP, EMBEDDING, HEAD = (
    "model.norm.weight",
    "model.layers.1.mlp.up_proj.weight",
    "model.embed_tokens.weight",
    "lm_head.weight",
)
AT_ODDS = {  # damage -> (what does it, what the error says)
    "a quantised folder": (lambda f: edited(f, quantization_config={"quant_method": "gptq", "bits": 4}), "quantised"),
    "quantised by its weights": (
        lambda f: stored(f, lambda w: {**w, "model.layers.0.mlp.up_proj.qweight": torch.zeros(4, 4, dtype=torch.int32)}),
        "quantised",
    ),
    "8-bit weights": (lambda f: stored(f, lambda w: {**w, UP: w[UP].to(torch.int8)}), "quantised"),
    "e4m3 weights": (lambda f: stored(f, lambda w: {**w, UP: w[UP].to(torch.float8_e4m3fn)}), "quantised"),
    "a head of its own, and tied": (
        lambda f: stored(f, lambda w: {**w, HEAD: w[EMBEDDING] + 1}),
        "disagree about the output head",
    ),
    "no head, and not tied": (lambda f: edited(f, tie_word_embeddings=False), "disagree about the output head"),
    "a weight less": (lambda f: stored(f, lambda w: {k: v for k, v in w.items() if k != UP}), "weights"),
    "a weight of another shape": (lambda f: stored(f, lambda w: {**w, UP: w[UP][:-1].clone()}), ""),
    "NaN": (lambda f: stored(f, lambda w: {**w, NORM: w[NORM] * float("nan")}), "no numbers"),
    "infinity": (lambda f: stored(f, lambda w: {**w, UP: w[UP] / 0.0}), "no numbers"),
    "no weights": (lambda f: stored(f, lambda w: {"nothing": torch.zeros(0)}), "damaged"),
    "a longer file": (lambda f: longer(f / "model.safetensors"), "damaged"),
    "a shard less": (lambda f: (sharded(f), (f / "model-2.safetensors").unlink()), "lacks weights"),
    "a shard that lacks a weight": (lambda f: sharded(f, also={"other.weight": "model-1.safetensors"}), "damaged"),
    "an index that lacks a weight": (lambda f: sharded(f, leave_out=[NORM]), "damaged"),
    "an index that leaves the folder": (lambda f: sharded(f, also={NORM: "../model-1.safetensors"}), "damaged"),
    "an index of numbers": (lambda f: sharded(f, also={NORM: 3}), "damaged"),
    "a header of another range": (lambda f: header(f, lambda h: h[NORM].update(data_offsets=[0, 2**62])), "damaged"),
    "a header of negative shape": (lambda f: header(f, lambda h: h[NORM].update(shape=[-32])), "damaged"),
    "a header of another dtype": (lambda f: header(f, lambda h: h[NORM].update(dtype="F64")), ""),
    "a header of no dtype": (lambda f: header(f, lambda h: h[NORM].update(dtype=3)), "damaged"),
    "a header without ranges": (lambda f: header(f, lambda h: h[NORM].pop("data_offsets")), ""),
    "a larger vocabulary in the tokenizer": (lambda f: edited(f, vocab_size=8), ""),
    "a family that nobody knows": (lambda f: edited(f, model_type="nobody"), ""),
    "no family": (lambda f: edited(f, model_type=...), ""),
    "no chat template": (lambda f: (f / "chat_template.jinja").unlink(), "chat template"),
    "a chat template that is a pointer": (lambda f: (f / "chat_template.jinja").write_bytes(POINTER), "LFS"),
    "a chat template in Latin-1": (lambda f: (f / "chat_template.jinja").write_bytes(b"\xe4"), "damaged"),
    "a chat template that is none": (lambda f: (f / "chat_template.jinja").write_text("{% for"), "template"),
}
ONLY_LOADED = ("a weight less", "a weight of another shape", "NaN", "infinity")
"""Damages that are seen when the weights are loaded: a dry run does not load them."""


@pytest.mark.slow
@pytest.mark.parametrize("name", AT_ODDS)
def test_every_command_refuses_a_folder_that_is_at_odds_with_itself(name, folder, tmp_path, capsys):
    damage, says = AT_ODDS[name]
    damage(folder)
    for words in commands(folder, tmp_path):
        if words[-1] == "--dry-run" and name in (*ONLY_LOADED, "no chat template", "a chat template that is none"):
            continue
        if (words[0] == "serve" and "chat template" in name and "is none" in name) or (
            words[0] == "serve" and "no chat" in name
        ):
            continue  # tokens in, tokens out
        if words[0] == "bench" and name == "a chat template that is none":
            continue  # it renders no conversation
        parts = refusal(capsys, words)
        assert says in parts["error"]
        assert "probe_tolerance" not in parts["fix"]


@pytest.mark.slow
def test_a_tokenizer_with_tokens_that_the_model_does_not_have_is_refused(folder, tmp_path, capsys):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    one = {"id": rows, "content": "<beyond>", "special": True, "normalized": False, "lstrip": False, "rstrip": False}
    tokenizer["added_tokens"].append({**one, "single_word": False})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    for words in commands(folder, tmp_path, heavy=False):
        parts = refusal(capsys, words)
        assert parts["error"] == "the tokenizer is larger than the model's embedding"
        assert f"'<beyond>' with the id {rows}" in parts["got"]
        assert f"vocab_size = {rows}" in parts["allowed"]


ODD = (..., -1, 0, 1, 3, 2**70, 10**400, float("inf"), float("nan"), -0.5, "x", "", [], {}, True, [[[]]], {"a": {}})


@pytest.mark.slow
@pytest.mark.parametrize(
    "key",
    [
        "architectures",
        "attention_bias",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "head_dim",
        "hidden_act",
        "hidden_size",
        "initializer_range",
        "intermediate_size",
        "layer_types",
        "max_position_embeddings",
        "model_type",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "pad_token_id",
        "rms_norm_eps",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "sliding_window",
        "tie_word_embeddings",
        "use_cache",
        "use_sliding_window",
        "vocab_size",
        "quantization_config",
        "partial_rotary_factor",
    ],
)
def test_a_config_of_any_value_is_refused_or_works(key, folder, tmp_path, capsys):
    for value in ODD:
        edited(folder, **{key: value})
        for words in list(commands(folder, tmp_path))[:2]:
            status = run([str(word) for word in words])
            said = capsys.readouterr().err
            assert status in (0, 2), (key, value, said)
            assert status == 0 or all(f"{part}: " in said for part in ("error", "got", "allowed", "fix"))
        shutil.rmtree(folder)
        shutil.copytree(folder.parent / "whole", folder)


@pytest.fixture(autouse=True)
def whole(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "whole")
