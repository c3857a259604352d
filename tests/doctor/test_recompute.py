"""With the weights of versions OLD is what a direct forward gives, and decisions are compared with it."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from oldlogits.batch.token_table import TokenTable
from oldlogits.core.errors import ConfigError, ModelFolderError, TokenTableError
from oldlogits.doctor.recompute import recompute
from oldlogits.doctor.tokens import Batch, Settings
from oldlogits.doctor.weights import open_weights
from oldlogits.models.load import load_model, named_weights
from oldlogits.versions import PatchStore

VERSIONS = (3, 4)


def weights_at(folder: Path, version: int) -> dict[str, torch.Tensor]:
    """The weights of a version: those of the folder, and noise of the version's seed."""
    generator = torch.Generator().manual_seed(version)
    weights = named_weights(load_model(folder))
    return {name: weight + 0.05 * torch.randn(weight.shape, generator=generator) for name, weight in weights.items()}


def direct(folder: Path, version: int, ids: torch.Tensor, temperature: float) -> np.ndarray:
    """Log-probs of tokens 1, 2, ... of a sequence, by transformers alone."""
    model = load_model(folder)
    model.load_state_dict(weights_at(folder, version), strict=False)
    with torch.no_grad():
        logits = model(ids[None, :-1]).logits[0].double() / temperature
    return logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0].numpy()


def table_of(ids: torch.Tensor, versions: list[int], mu: np.ndarray, theta: np.ndarray, *, context: bool = True) -> TokenTable:
    num = len(ids)
    columns = {
        "trajectory": np.array(["t"] * num), "index": np.arange(num), "token_id": ids.numpy(), "mask": np.arange(num) > 1,
        "version": np.where(np.arange(num) > 1, versions, -1), "trainer_version": np.full(num, 5),
        "logp_mu": mu, "logp_theta": theta, "advantage": np.ones(num), "temperature": np.full(num, 0.7),
    }  # fmt: skip
    return TokenTable.of(columns if context else {name: column[2:] for name, column in columns.items()})


def saved(folder: Path, home: Path, kind: str) -> tuple[Path, str | None]:
    if kind == "store":
        with PatchStore(home / "versions") as store:
            for version in VERSIONS:
                store.publish(version, weights_at(folder, version))
        return home / "versions", str(folder)
    for version in VERSIONS:
        model = load_model(folder)
        model.load_state_dict(weights_at(folder, version), strict=False)
        model.save_pretrained(home / "checkpoints" / f"global_step_{version}" / "model")
    return home, None


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["store", "checkpoints"])
def test_old_is_a_direct_forward_at_each_tokens_own_version(tiny_folder: Path, tmp_path: Path, kind: str) -> None:
    ids = torch.arange(3, 15)
    path, model = saved(tiny_folder, tmp_path, kind)
    versions = [3] * 6 + [4] * 6
    third, fourth = (direct(tiny_folder, version, ids, 0.7) for version in VERSIONS)
    expected = np.concatenate([[np.nan], third[:5], fourth[5:]])
    mu = expected + np.where(np.arange(12) == 8, 0.5, 0.001)
    batch = Batch(source="b", framework="", table=table_of(ids, versions, mu, expected + 0.4))
    found = recompute(batch, open_weights(path, model), Settings())
    np.testing.assert_allclose(found.exact.table.columns()["logp_old"][2:], expected[2:], atol=1e-5)
    assert found.left_out == ()
    assert [(at.lag, at.num_tokens) for at in found.lags] == [(1, 6), (2, 4)]
    assert found.lags[0].log_r_s == pytest.approx(0.4, abs=1e-5)
    assert found.lags[1].log_r_d == pytest.approx(0.001, abs=1e-5)
    # theta / mu is exp(0.399) and clipped, but for token 8, which exp(-0.1) keeps; by OLD all are clipped, and r_d masks it
    assert sum(at.changed for at in found.lags) == 1
    assert found.verdict.where == ("t[8]",)


@pytest.mark.slow
def test_adapters_are_merged_into_their_base(tiny_folder: Path, tmp_path: Path) -> None:
    base, ids = named_weights(load_model(tiny_folder)), torch.arange(3, 15)
    name = next(name for name in base if name.endswith("q_proj.weight"))
    a, b = torch.randn(2, base[name].shape[1]), torch.randn(base[name].shape[0], 2)
    folder = tmp_path / "lora-v3"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 4}))
    key = f"base_model.model.{name.removesuffix('.weight')}"
    save_file({f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}, folder / "adapter_model.safetensors")
    opened = open_weights(tmp_path, str(tiny_folder))
    assert opened.versions == (3,)
    with opened.at(3) as model:
        torch.testing.assert_close(dict(model.named_parameters())[name].data, base[name] + 2 * b @ a)
    mu = np.zeros(12)
    found = recompute(Batch(source="b", framework="", table=table_of(ids, [3] * 12, mu, mu)), opened, Settings())
    assert np.isfinite(found.exact.table.columns()["logp_old"][2:]).all()


@pytest.mark.slow
def test_what_cannot_be_scored_is_counted_by_reason(tiny_folder: Path, tmp_path: Path) -> None:
    path, model = saved(tiny_folder, tmp_path, "store")
    ids, mu = torch.arange(3, 15), np.full(12, -1.0)
    opened = open_weights(path, model)
    missing = recompute(Batch(source="b", framework="", table=table_of(ids, [3] * 6 + [9] * 6, mu, mu)), opened, Settings())
    assert missing.left_out == (("of versions whose weights are not there", 6),)
    cut = recompute(Batch(source="b", framework="", table=table_of(ids, [3] * 12, mu, mu, context=False)), opened, Settings())
    assert cut.left_out == (("without their whole context", 10),)
    assert cut.verdict.outcome == "cannot-tell"


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no weights of versions"):
        open_weights(tmp_path, None)
    (tmp_path / "versions.json").touch()
    with pytest.raises(ConfigError, match="--model"):
        open_weights(tmp_path, None)


@pytest.mark.slow
def test_tokens_beyond_the_models_vocabulary_are_refused_and_a_lag_of_any_size_costs_nothing(
    tiny_folder: Path, tmp_path: Path
) -> None:
    opened = open_weights(*saved(tiny_folder, tmp_path, "store"))
    ids, mu = torch.arange(3, 15), np.full(12, -1.0)
    table = table_of(ids, [3] * 12, mu, mu)
    far = dataclasses.replace(table, trainer_version=np.full(12, 2**31 - 1, np.int32))
    [row] = recompute(Batch(source="b", framework="", table=far), opened, Settings()).lags
    assert (row.lag, row.num_tokens) == (2**31 - 4, 10)
    beyond = dataclasses.replace(table, token_id=np.where(np.arange(12) == 4, 2**30, table.token_id).astype(np.int32))
    with pytest.raises(TokenTableError, match=r"token 1073741824 at t\[4\]"):
        recompute(Batch(source="b", framework="", table=beyond), opened, Settings())


@pytest.mark.slow
@pytest.mark.parametrize("setting", [{"alpha_pattern": {"q_proj": 64}}, {"rank_pattern": {"q_proj": 4}}, {"use_dora": True}])
def test_an_adapter_that_is_scaled_otherwise_is_refused(tiny_folder: Path, tmp_path: Path, setting: dict[str, object]) -> None:
    (tmp_path / "v3").mkdir()
    (tmp_path / "v3" / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 4, **setting}))
    save_file({}, tmp_path / "v3" / "adapter_model.safetensors")
    opened = open_weights(tmp_path, str(tiny_folder))
    with pytest.raises(ModelFolderError, match=next(iter(setting))), opened.at(3):
        pass


def test_two_folders_of_one_version_are_refused_and_those_without_weights_are_not_looked_at(tmp_path: Path) -> None:
    for name in ("checkpoint-3", "logs-3", "best-3"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-3" / "config.json").touch()
    assert open_weights(tmp_path, None).versions == (3,)
    (tmp_path / "best-3" / "config.json").touch()
    with pytest.raises(ConfigError, match=r"two folders of .* are of version 3.*best-3 and checkpoint-3"):
        open_weights(tmp_path, None)
