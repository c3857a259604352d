"""Runs with LoRA adapters: versions are adapters, old logits stay exact, and the base never changes."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from oldlogits.batch.collate import TokenBatch
from oldlogits.cli.main import run as command
from oldlogits.core.engine import EngineSpec, Sampling
from oldlogits.core.errors import ExactnessError
from oldlogits.core.policies import OLD
from oldlogits.core.scoring import Scored
from oldlogits.core.weights import FullWeights
from oldlogits.engines.embedded.engine import EngineCore
from oldlogits.models.adapters import is_adapter
from oldlogits.models.load import load_model
from oldlogits.run.specs import trainer_spec
from oldlogits.train.trainer import Trainer

from ..builders import batch_of, sampled, trajectory
from ..runs import check_accounting, events_of, recipe, summary_of, tokens_of, write_recipe
from ..servers import serving

pytestmark = pytest.mark.slow

RANK, ALPHA = 4, 8.0
LORA = {"lora_rank": RANK, "lora_alpha": ALPHA}
PROBE = list(range(8, 20))


def lora_recipe(folder: Path, **sections):
    model = {**LORA, **sections.pop("model", {})}
    config = recipe(folder, **{"trainer": {"lr": 3e-2, "warmup_steps": 0}, **sections})
    return replace(config, model=replace(config.model, **model))


def trained(folder: Path, tmp_path: Path, **sections) -> Path:
    path = write_recipe(tmp_path / "r.toml", lora_recipe(folder, **sections))
    assert command(["train", str(path), "--out", str(tmp_path / "run")]) == 0
    return tmp_path / "run"


def num_adapter_parameters(folder: Path) -> int:
    layers = [m for n, m in load_model(folder).named_modules() if n.endswith("_proj")]
    return sum(RANK * sum(layer.weight.shape) for layer in layers)


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"model": {"forward_dtype": "bf16"}},
        {"runtime": {"type": "local"}, "engine": {"precision": "fp8"}},
        {"runtime": {"type": "local"}, "model": {"forward_dtype": "bf16"}, "proximal": {"source": "dedicated"}},
        {"proximal": {"source": "eager"}},
        {"variant": "ppo_ewma_train_infer", "proximal": {"source": "ewma"}},
        {"variant": "rescore_train_infer", "proximal": {"source": "rescore"}, "engine": {"precision": "int8"}},
        {"trainer": {"lr": 3e-2, "warmup_steps": 0, "activation_checkpointing": True}},
    ],
    ids=["fp32", "bf16", "local, fp8", "local, bf16, dedicated", "eager", "ewma", "rescore, int8", "checkpointing"],
)
def test_the_laws_hold_under_every_route_and_a_version_is_its_adapters(sections, tiny_folder, tmp_path):
    out = trained(tiny_folder, tmp_path, **sections)
    check_accounting(out)
    summary = summary_of(out)
    for name in ("consistency_publish_max_abs_error", "consistency_lag0_max_abs_error", "probe_max_abs_error"):
        assert summary[name] is None or summary[name] <= 1e-5, name
    tokens = tokens_of(out, "log_r_d", "staleness", "provenance")
    assert tokens["staleness"].max() > 0
    if summary["provenance"].keys() == {"exact"} and sections.get("engine", {}).get("precision") is None:
        assert np.abs(tokens["log_r_d"]).max() <= 1e-4, "two engines, one version"
    sent = [event.bytes for event in events_of(out, "weights_updated")]
    size = 2 if sections.get("model", {}).get("forward_dtype") == "bf16" else 4
    assert max(sent) == size * num_adapter_parameters(tiny_folder)


def test_what_versions_cost_is_measured_against_the_adapters_that_are_trained_not_against_the_base(tiny_folder, tmp_path):
    summary = summary_of(trained(tiny_folder, tmp_path))
    assert summary["version_share_of_average"] == summary["version_share_of_copy"], "both have 4 bytes a trained parameter"
    published = [dict(event.recorded()) for event in events_of(tmp_path / "run", "published")]
    live = 4 * num_adapter_parameters(tiny_folder)
    assert {fields["full_bytes"] for fields in published} == {live}
    most = max(fields["bytes"] for fields in published[1:])
    assert summary["trainer_copies_max"] == 1 + most / live >= 2, "the live adapters and at least one stored copy of them"


@pytest.mark.parametrize("numerics", ["fp32", "fp8"])
def test_a_server_adds_the_adapters_to_its_own_folder(numerics, tiny_folder, tmp_path):
    with serving(tiny_folder, "--adapter-scale", str(ALPHA / RANK), "--numerics", numerics) as server:
        engine = {"type": "vllm", "urls": [server.url], "precision": numerics}
        out = trained(tiny_folder, tmp_path, runtime={"type": "local"}, engine=engine)
    check_accounting(out)
    assert max(event.max_abs_error for event in events_of(out, "probe")) <= 1e-4
    tokens = tokens_of(out, "log_r_d", "provenance")
    assert set(tokens["provenance"]) == {"exact"}
    assert (np.abs(tokens["log_r_d"]).max() <= 1e-4) == (numerics == "fp32")
    sent = [event.bytes for event in events_of(out, "weights_updated")]
    assert max(sent) == 4 * num_adapter_parameters(tiny_folder), "adapters alone travel"


@pytest.mark.parametrize("options", [[], ["--adapter-scale", "3"]])
def test_a_server_that_takes_other_weights_is_refused_with_the_remedy(options, tiny_folder, tmp_path, capsys):
    with serving(tiny_folder, *options) as server:
        config = lora_recipe(tiny_folder, runtime={"type": "local"}, engine={"type": "vllm", "urls": [server.url]})
        path = write_recipe(tmp_path / "r.toml", config)
        assert command(["train", str(path), "--out", str(tmp_path / "run")]) == 2
    assert f"--adapter-scale {ALPHA / RANK!r}" in capsys.readouterr().err


@pytest.fixture(scope="module")
def finished(tiny_folder, tmp_path_factory):
    """A run of four updates. Read it only."""
    return trained(tiny_folder, tmp_path_factory.mktemp("lora"), record={"checkpoint_every": 2})


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks transformers for it
def test_a_checkpoint_is_a_standard_folder_and_an_adapter_of_the_base_with_the_same_logits(finished, tiny_folder):

    checkpoint, ids = finished / "checkpoints/v000004", torch.tensor([PROBE])
    assert load_file(checkpoint / "model/model.safetensors").keys() == load_file(tiny_folder / "model.safetensors").keys()
    with torch.no_grad():
        whole = load_model(checkpoint / "model")(input_ids=ids).logits
        before = load_model(tiny_folder)(input_ids=ids).logits
        theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), checkpoint / "adapter")
        adapted = theirs.eval()(input_ids=ids).logits
    assert torch.allclose(adapted, whole, atol=1e-5)
    assert (adapted - before).abs().max() > 0.01


def test_layers_without_an_adapter_keep_every_bit(finished, tiny_folder):
    before, after = (load_file(f / "model.safetensors") for f in (tiny_folder, finished / "checkpoints/v000004/model"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith("_proj.weight")}


def test_a_killed_run_goes_on_from_its_last_checkpoint(finished, tmp_path):
    copied = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(copied / "checkpoints/v000004")
    assert command(["train", "--resume", str(copied)]) == 0
    check_accounting(copied)
    summary = summary_of(copied)
    assert (summary["num_updates"], summary["ended"]) == (4, "done")
    assert summary["consistency_publish_max_abs_error"] <= 1e-5


def test_the_state_of_a_checkpoint_is_restored_bit_for_bit(tiny_folder, tmp_path):
    trainer = stepped(Trainer(trainer_spec(lora_recipe(tiny_folder)), tiny_folder, PROBE))
    published = trainer.publish()
    trainer.save(tmp_path)
    again = trainer_at(tiny_folder, tmp_path)
    assert np.array_equal(again.publish().probe_logps, published.probe_logps)
    for name, weight in adapters_of(trainer).items():
        assert torch.equal(weight, adapters_of(again)[name]), name
    for a, b in zip(adapters_of(stepped(trainer)).values(), adapters_of(stepped(again)).values(), strict=True):
        assert torch.equal(a, b), "moments and schedule as well"


def test_another_base_under_the_adapters_is_noticed(tiny_folder, tmp_path):
    trainer = stepped(Trainer(trainer_spec(lora_recipe(tiny_folder)), tiny_folder, PROBE))
    trainer.publish()
    trainer.save(tmp_path / "checkpoint")
    other = Path(shutil.copytree(tiny_folder, tmp_path / "other"))
    model = load_model(other)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(0.01)
    model.save_pretrained(other)
    with pytest.raises(ExactnessError, match="the restored version 1 contradicts"):
        trainer_at(other, tmp_path / "checkpoint")


def test_only_adapters_are_trained_and_have_moments_and_the_base_stays(tiny_folder):
    trainer = Trainer(trainer_spec(lora_recipe(tiny_folder)), tiny_folder, PROBE)
    model = trainer.live.model
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    stepped(stepped(trainer))  # B is zero before the first step, so that A has no gradient
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != is_adapter(name), name
    assert {p for p in model.parameters() if p.requires_grad} == set(trainer.optimizer.adamw.state)


def test_the_scoring_module_and_the_live_one_share_the_base(tiny_folder):
    trainer = Trainer(trainer_spec(lora_recipe(tiny_folder)), tiny_folder, PROBE)
    live, scoring = (dict(model.named_parameters()) for model in (trainer.live.model, trainer.live.scoring))
    assert all(scoring[name].data_ptr() == live[name].data_ptr() for name in live if not is_adapter(name))


@pytest.mark.parametrize("numerics", ["fp32", "bf16", "fp8", "int8", "int4"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_engine_adds_the_adapters_and_the_trainer_knows_what_it_then_holds(numerics, dtype, tiny_folder):
    config = lora_recipe(tiny_folder, model={"forward_dtype": dtype}, engine={"precision": numerics})
    spec = EngineSpec(
        model_path=str(tiny_folder), numerics=numerics, max_num_seqs=2, max_context=64, adapter_scale=ALPHA / RANK
    )
    core, trainer = EngineCore(spec), stepped(Trainer(trainer_spec(config), tiny_folder, PROBE))
    published = trainer.publish()
    assert isinstance(published.update, FullWeights)
    core.pause("keep", "recompute")
    core.update_weights(published.update.tensors, 1)
    core.resume()
    core.add("probe", PROBE, Sampling(max_tokens=1, prompt_logprobs=True))
    [(_, generation)] = core.step()
    np.testing.assert_allclose(generation.prompt_logprobs, published.engine_probe_logps, rtol=0, atol=1e-5)
    assert (np.abs(published.engine_probe_logps - published.probe_logps).max() > 1e-4) == (numerics not in ("fp32",))


def trainer_at(folder: Path, checkpoint: Path) -> Trainer:
    trainer = Trainer(trainer_spec(lora_recipe(folder)), folder, PROBE)
    trainer.restore(checkpoint)
    return trainer


def adapters_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in trainer.full_weights().tensors.items()}


def stepped(trainer: Trainer) -> Trainer:
    """One update on tokens of the current version."""
    batch = _batch(trainer.version)
    trainer.publish()
    trainer.put_batch(batch)
    num = int(batch.loss_mask.sum())
    values = trainer.scorer.score(np.arange(num), at=trainer.version)
    at = np.full(num, trainer.version, np.int64)
    trainer.train(Scored(policy=OLD, values=values, computed_at=at, num_switches=1))
    return trainer


def _batch(version: int) -> TokenBatch:
    """What was sampled is as likely as its version says, up to the band: its tokens are not masked."""
    said = [trajectory([8, 9], sampled([10 + i, 11, 12], version, logp=-3.5), id=f"g0.{i}") for i in range(4)]
    return batch_of([replace(t, reward=float(i % 2)) for i, t in enumerate(said)])
