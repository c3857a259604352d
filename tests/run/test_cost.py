"""What a dry run says of bytes, against what the parts hold when they are made."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig

from oldlogits.batch.collate import TokenBatch
from oldlogits.batch.pad import micro_batches
from oldlogits.config.load import config_from_table
from oldlogits.core.engine import EngineSpec
from oldlogits.core.errors import ConfigError, ModelFolderError
from oldlogits.engines.embedded.engine import EngineCore
from oldlogits.models.load import load_model, named_weights
from oldlogits.models.lora import add_adapters
from oldlogits.models.mixed_kv import MixedForward
from oldlogits.models.scorer import action_logps
from oldlogits.run.cost import Cost, estimate
from oldlogits.run.run import run
from oldlogits.train.weights.engine_view import EngineView
from oldlogits.versions import PatchStore
from order_desk.tiny import TinySize, save_tiny, tiny_model, tiny_tokenizer

from ..builders import batch_of, sampled, trajectory
from ..conftest import WORDS
from ..engines.reference import make_model, save
from ..runs import recipe, write_recipe
from . import trainer_memory

FAMILIES = ["llama", "qwen2", "qwen3", "qwen3 top-1 of 4 experts"]


def cost_of(folder: Path, **sections: object) -> Cost:
    found = estimate(config_from_table({"model": {"path": str(folder)}, **sections}))
    assert found is not None
    return found


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("numerics", ["fp32", "bf16", "int4"])
def test_the_view_of_the_engine_is_a_copy_with_a_head_of_its_own_and_none_for_fp32(name, numerics, tmp_path):
    model = make_model(name)
    cost = cost_of(save(model, tmp_path), engine={"precision": numerics})
    held = 0 if numerics == "fp32" else sum(p.nbytes for p in EngineView(model, numerics).model.parameters())
    assert cost.view_bytes == held
    assert any(f"{held / 2**20:,.1f} MiB: the trainer's copy" in line for line in cost.lines())


@pytest.mark.parametrize("name", FAMILIES)
def test_masters_gradient_and_moments_are_what_a_step_of_the_optimizer_holds(name, tmp_path):
    model = make_model(name)
    cost = cost_of(save(model, tmp_path))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.arange(8).reshape(1, 8)
    torch.autograd.backward(model(input_ids=ids, labels=ids).loss)
    optimizer.step()
    moments = [entry[key] for entry in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    assert cost.shape.num_parameters == sum(p.numel() for p in model.parameters())
    assert cost.masters_bytes == cost.version_bytes == sum(p.nbytes for p in model.parameters())
    assert cost.gradient_bytes == sum(p.grad.nbytes for p in model.parameters())
    assert cost.optimizer_bytes == sum(moment.nbytes for moment in moments)


@pytest.mark.parametrize("recompute", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_a_micro_batch_keeps_at_most_what_is_said_and_not_much_less(name, recompute, tmp_path):
    model, tokens = make_model(name), 96
    sections = {"micro_batch_tokens": tokens, "head_chunk_tokens": 16, "activation_checkpointing": recompute}
    cost = cost_of(save(model, tmp_path), trainer=sections, env={"max_episode_tokens": 96})
    batch = batch_of([trajectory([3] * 48, sampled([5] * 49, 0))])
    [micro] = micro_batches(batch, np.flatnonzero(batch.loss_mask), tokens)
    assert micro.input_ids.numel() == tokens
    widest = widest_layer(model, micro) if recompute else 0
    kept = kept_bytes(model, micro, recompute=recompute) + widest
    head = 4 * 16 * 3 * cost.shape.vocabulary  # formed in the backward pass, chunk after chunk
    assert kept <= cost.activation_bytes - head <= 1.15 * kept


def kept_bytes(model, micro, *, recompute: bool) -> int:
    """Of all storages that the forward pass keeps for the backward pass, the parameters left out."""
    layers = model.base_model.layers
    if recompute:
        for layer in layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    return saved_bytes(model, lambda: action_logps(model, micro, head_chunk_tokens=16))


def widest_layer(model, micro) -> int:
    """What one layer keeps while its backward pass goes on, its input left out."""
    inner = copy.deepcopy(model.base_model)
    kept = []
    for num in (1, 2):
        inner.config.num_hidden_layers, inner.layers = num, model.base_model.layers[:num]
        kept.append(saved_bytes(model, lambda: inner(input_ids=micro.input_ids, use_cache=False).last_hidden_state))
    return kept[1] - kept[0] - 4 * micro.input_ids.numel() * model.config.hidden_size


def saved_bytes(model, forward) -> int:
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = {}

    def note(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = forward()
    assert out.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_with_adapters_only_these_cost_gradient_moments_and_versions(name, tmp_path):
    lora = {"rank": 4, "alpha": 8.0, "targets": ("q_proj", "v_proj", "down_proj")}
    model = make_model(name)
    sections = {"micro_batch_tokens": 96, "head_chunk_tokens": 16}
    folder = save(model, tmp_path)
    keys = {"lora_rank": 4, "lora_alpha": 8.0, "lora_targets": list(lora["targets"])}
    cost = cost_of(tmp_path, model={"path": folder, **keys}, trainer=sections, env={"max_episode_tokens": 96})
    plain = cost_of(tmp_path)
    add_adapters(model, **lora)
    trained = sum(p.nbytes for p in named_weights(model).values())
    assert cost.masters_bytes == sum(p.nbytes for p in model.parameters())
    assert cost.version_bytes == cost.gradient_bytes == cost.sync_bytes == trained
    assert cost.optimizer_bytes == 2 * trained
    assert cost.engine_bytes == plain.engine_bytes + plain.masters_bytes, (
        "the engine keeps its base beside what it computes with"
    )
    batch = batch_of([trajectory([3] * 48, sampled([5] * 49, 0))])
    [micro] = micro_batches(batch, np.flatnonzero(batch.loss_mask), 96)
    head = 4 * 16 * 3 * cost.shape.vocabulary
    assert kept_bytes(model, micro, recompute=False) <= cost.activation_bytes - head


@pytest.mark.parametrize(
    ("name", "keys", "refusal"),
    [
        ("qwen3 top-1 of 4 experts", {"lora_rank": 4}, "model.lora_targets names layers .*gate_proj, up_proj, down_proj"),
        ("qwen3", {"routing": "replayed"}, "no routers that could follow .*a Qwen3ForCausalLM"),
    ],
)
def test_what_a_model_has_not_is_refused_before_anything_is_started(name, keys, refusal, tmp_path):
    folder = save(make_model(name), tmp_path)
    with pytest.raises(ConfigError, match=refusal):
        cost_of(tmp_path, model={"path": folder, **keys})


def test_the_store_holds_at_most_what_is_said(tiny_folder):
    config = recipe(tiny_folder)
    store, generator = PatchStore(), torch.Generator().manual_seed(0)
    weights = {name: p.data.clone() for name, p in load_model(tiny_folder).named_parameters()}
    for version in range(config.window + 2):
        store.publish(version, weights)
        weights = {name: w + torch.rand(w.shape, generator=generator) for name, w in weights.items()}
    full = cost_of(tiny_folder).version_bytes
    bound = estimate(config).store_bytes
    assert bound == (config.window + 2) * full
    assert 0.95 * bound < store.num_bytes < 1.02 * bound  # every value changes; a patch has a header
    assert estimate(recipe(tiny_folder, variant="ppo_clip_train_infer", proximal={"source": "none"})).store_bytes == 0


@pytest.mark.parametrize("lr, low, high", [(1e-6, 0.009, 0.013), (1e-5, 0.05, 0.07), (1e-2, 1, 1)])
def test_a_bf16_version_is_half_as_large_and_its_patch_is_as_measured_at_the_learning_rate(lr, low, high, tiny_folder):
    bf16 = cost_of(tiny_folder, model={"path": str(tiny_folder), "forward_dtype": "bf16"}, trainer={"lr": lr})
    fp32 = cost_of(tiny_folder, trainer={"lr": lr})
    assert 2 * bf16.version_bytes == fp32.version_bytes == fp32.sync_bytes
    share = (bf16.expected_store_bytes - bf16.version_bytes) / (bf16.store_bytes - bf16.version_bytes)
    assert low <= share <= high * 1.001
    assert bf16.sync_bytes == pytest.approx(share * bf16.version_bytes, rel=1e-3)


def test_over_ranks_all_is_shared_but_activations_and_whole_layers(tiny_folder):
    cost = cost_of(tiny_folder)
    alone, two, many = (cost.rank_bytes(n) for n in (1, 2, 10**9))
    per_rank = cost.activation_bytes + cost.gathered_bytes
    assert two - per_rank == -(-(alone - cost.activation_bytes) // 2)
    assert many == per_rank + 1


@pytest.mark.slow
def test_the_bytes_of_checkpoints_are_those_on_disk_and_as_many_stay_as_is_said(tiny_folder, tmp_path):
    for dtype, rank in (("fp32", 0), ("bf16", 0), ("fp32", 4)):
        config = recipe(tiny_folder, num_updates=1, model={"forward_dtype": dtype, "lora_rank": rank})
        assert run(config, tmp_path / f"{dtype}{rank}").error is None
        [checkpoint] = (tmp_path / f"{dtype}{rank}" / "checkpoints").iterdir()
        written = sum(path.stat().st_size for path in checkpoint.rglob("*.safetensors"))
        assert written == pytest.approx(estimate(config).checkpoint_bytes, rel=0.25 if rank else 0.12)  # headers, small model
    many = {"num_updates": 100, "eval": {"every": 5}}
    for record, num in (({}, 3), ({"keep_best": False}, 2), ({"keep_every": 50}, 5), ({"checkpoint_every": 0}, 1)):
        cost = estimate(recipe(tiny_folder, **many, record=record))
        assert cost.num_checkpoints == num
        [line] = [line for line in cost.lines() if line.startswith("checkpoints ")]
        assert f"each; at most {num} stay on disk, {cost.checkpoint_bytes * (num + 1) / 2**20:,.1f} MiB with the one" in line


SHAPES = {
    "a small vocabulary": (TinySize(hidden=512, layers=8, heads=8, kv_heads=4, mlp=2048, max_context=128), 500, {}),
    "a large vocabulary": (TinySize(hidden=512, layers=3, heads=8, kv_heads=4, mlp=1536, max_context=128), 24_000, {}),
    "bf16, and rounded weights in the engine": (
        TinySize(hidden=512, layers=8, heads=8, kv_heads=4, mlp=2048, max_context=128),
        500,
        {"model": {"forward_dtype": "bf16"}, "engine": {"precision": "fp8"}, "trainer": {"lr": 1e-5}},
    ),
}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system does not tell the peak of a process")
@pytest.mark.parametrize("name", SHAPES)
def test_the_peak_of_a_trainer_that_writes_a_checkpoint_is_that_of_the_dry_run_within_15_percent(name, tmp_path):
    size, vocabulary, sections = SHAPES[name]
    tokenizer = tiny_tokenizer(WORDS)
    model = tiny_model(size, vocabulary, tokenizer.eos_token_id, tokenizer.pad_token_id, seed=0)
    save_tiny(tmp_path / "model", model, tokenizer)
    trainer = {"lr": 1e-4, "micro_batch_tokens": 192, "head_chunk_tokens": 64} | sections.get("trainer", {})
    config = recipe(tmp_path / "model", max_staleness=1, runtime={"type": "local"}, **{**sections, "trainer": trainer})
    words = [sys.executable, "-m", trainer_memory.__name__, str(write_recipe(tmp_path / "r.toml", config))]
    played = subprocess.run([*words, str(tmp_path / "checkpoint")], capture_output=True, text=True, check=True)
    assert estimate(config).process_bytes == pytest.approx(int(played.stdout), rel=0.15)


def test_the_config_of_a_folder_is_enough_and_without_it_nothing_is_said(tiny_folder, tmp_path):
    shutil.copy(tiny_folder / "config.json", tmp_path)
    assert cost_of(tmp_path) == cost_of(tiny_folder)
    assert estimate(config_from_table({"model": {"path": str(tmp_path / "nowhere")}})) is None


def test_a_model_of_another_family_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ModelFolderError, match="model_type = 'gpt2'"):
        cost_of(tmp_path)


def test_the_embedded_engine_holds_what_is_said(tmp_path):
    model = make_model("qwen3")
    cost = cost_of(save(model, tmp_path), engine={"precision": "int4"})
    core = EngineCore(EngineSpec(model_path=str(tmp_path), numerics="int4", max_num_seqs=2, max_context=16))
    held = sum(tensor.nbytes for tensor in core._decoder._weights.tensors())
    heads = (cost.shape.heads + cost.shape.kv_heads) * cost.shape.head_dim * cost.shape.layers * 4
    assert cost.engine_bytes <= held <= cost.engine_bytes + heads  # norms of heads are held once for each head


def test_the_tiny_model_has_a_tied_head():
    cost = estimate(config_from_table({"engine": {"precision": "fp8"}}))
    assert 0 < cost.view_bytes - cost.masters_bytes < cost.masters_bytes


STALE = {"engine": {"kv": "stale"}, "proximal": {"accept_mixed_kv": True}}


def test_the_mixed_forward_holds_at_most_what_is_said(tiny_folder):
    config = recipe(tiny_folder, **STALE)
    num, longest = config.rollout.prompts_per_update * config.rollout.group_size, config.env.max_episode_tokens
    worst = [worst_trajectory(i, longest, config.window) for i in range(num)]
    assert entries_bytes(tiny_folder, batch_of(worst)) <= estimate(config).mixed_bytes
    assert entries_bytes(tiny_folder, batch_of(worst)) > estimate(config).mixed_bytes / 2
    assert estimate(recipe(tiny_folder)).mixed_bytes == 0


def worst_trajectory(number: int, length: int, num_updates: int):
    """Each update is within a turn, and the next turn has lost its entries."""
    segments = [[3] * (length - 3 * num_updates)]
    for version in range(num_updates):
        segments += [[4], sampled([5], version), sampled([6], version + 1, kv="mixed")]
    return trajectory(*segments, id=f"g0.{number}")


def entries_bytes(folder, batch: TokenBatch) -> int:
    """Of all chains, keys and values of every layer in fp32."""
    config = AutoConfig.from_pretrained(folder)
    forward = MixedForward(load_model(folder), batch, micro_batch_tokens=4096, head_chunk_tokens=16)
    chains, longest = forward._entries._shape
    return int(np.prod([chains, longest, config.num_hidden_layers, config.num_key_value_heads, config.head_dim])) * 2 * 4
