"""What another recipe would have made of the same batches, against arithmetic by hand on the recorded tables."""

import math

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from oldlogits.replay.figures import cosine, weights_apart

from ..runs import recipe
from .runs import recorded, replayed

pytestmark = pytest.mark.slow

ONE_STEP = {
    "trainer": {"lr": 1e-2, "warmup_steps": 0, "minibatches_per_update": 1},
    "engine": {"precision": "int4", "max_num_seqs": 32},
}


def columns_of(folder, version):
    table = pq.read_table(folder / f"tokens/v{version:06d}.parquet")
    return {name: np.array(table.column(name).to_pylist()) for name in table.column_names if name != "context"}


@pytest.fixture(scope="module")
def noisy_run(tiny_folder, tmp_path_factory):
    """A run of one optimizer step an update, whose engine rounds to four bits, so that the band has something to mask."""
    return recorded(tiny_folder, tmp_path_factory.mktemp("noisy") / "run", **ONE_STEP)


def test_a_tighter_band_masks_the_tokens_and_gives_the_loss_that_the_record_says(noisy_run, tmp_path):
    found = replayed(noisy_run, tmp_path / "replay", "--band", "1.02", "--num-updates", "1")
    [one] = found["updates"]
    was = columns_of(noisy_run, 1)
    in_band = np.abs(was["log_r_d"]) <= math.log(1.02)
    active = in_band & was["clip_mask"]
    assert found["changes"] == {"band": [1.5, 1.02]}
    change = one["change"]
    assert (change["num_gained"], change["num_lost"]) == (0, int((was["active_mask"] & ~active).sum()))
    assert change["num_lost"] > 10
    assert change["num_band"] == int((was["band_mask"] & ~in_band).sum())
    assert change["num_clip"] == 0
    weight = np.exp(was["logp_theta"] - was["logp_mu"]) * np.abs(was["advantage"])
    lost = was["active_mask"] & ~active
    assert change["weight_share"] == pytest.approx(weight[lost].sum() / weight[was["active_mask"]].sum(), rel=1e-5)
    # On the first batch r_s is 1, so that each kept token counts r_d A.
    loss = -np.where(in_band, np.exp(was["log_r_d"] + was["log_r_s"]) * was["advantage"], 0).mean()
    assert change["loss"] == pytest.approx(loss, rel=1e-4, abs=1e-7)
    assert 0 < change["gradient_cosine"] < 1
    assert found["weights"]["distance"] > 0


def test_a_denominator_changes_the_length_of_the_gradient_and_not_its_direction(noisy_run, tmp_path):
    num_tokens = len(columns_of(noisy_run, 1)["index"])
    words = ["--objective.loss-aggregation", "constant", "--objective.loss-aggregation-tokens", str(4 * num_tokens)]
    found = replayed(noisy_run, tmp_path / "replay", *words, "--num-updates", "1")
    [one] = found["updates"]
    assert one["change"]["loss"] == pytest.approx(one["loss"] / 4, rel=1e-5)
    assert one["change"]["gradient_norm"] == pytest.approx(one["gradient_norm"] / 4, rel=1e-4)
    assert one["change"]["gradient_cosine"] == pytest.approx(1, abs=1e-6)
    assert one["change"]["num_gained"] == one["change"]["num_lost"] == 0


def test_a_learning_rate_changes_nothing_but_the_weights_until_the_next_batch(noisy_run, tmp_path):
    found = replayed(noisy_run, tmp_path / "replay", "--trainer.lr", "1e-3")
    first, *later = (one["change"] for one in found["updates"])
    assert first["gradient_cosine"] == pytest.approx(1, abs=1e-12)
    assert first["loss"] == found["updates"][0]["loss"]
    assert first["logp_theta_mean_abs"] == 0
    assert all(one["logp_theta_mean_abs"] > 0 for one in later)
    assert found["weights"]["distance"] > 0.5 * found["weights"]["moved"] > 0
    assert 0 < found["weights"]["cosine"] <= 1
    assert [one["num_unlike"] for one in found["updates"]] == [0] * 4, "the recorded recipe is replayed beside it, bit for bit"


@pytest.mark.parametrize(
    "words", [("--variant", "ppo_clip"), ("--trainer.lr", "1e-3"), ("--trainer.minibatches-per-update", "3")]
)
def test_the_old_logits_are_those_of_the_versions_that_sampled_and_not_of_the_replay(noisy_run, tmp_path, words):
    replayed(noisy_run, tmp_path / "replay", *words)
    for version in range(1, 5):
        was, now = columns_of(noisy_run, version), columns_of(tmp_path / "replay", version)
        assert was["logp_proximal"].tobytes() == now["logp_proximal"].tobytes()
        assert (version == 1 and "minibatches" not in words[0]) or not np.array_equal(was["logp_theta"], now["logp_theta"])


def test_old_logits_that_a_run_never_had_are_computed_at_its_own_versions(tiny_folder, tmp_path):
    """The run is trained with ASYNC; OLD at lag 0 is the same number, and at lag 1 ASYNC of the version before."""
    from oldlogits.run.specs import trainer_spec
    from oldlogits.train.trainer import Trainer

    lags = {"lockstep": {"max_lag": 2, "tokens_per_version": 6, "lag": "random"}}
    run_folder = recorded(tiny_folder, tmp_path / "run", variant="decoupled_async", **lags)
    found = replayed(run_folder, tmp_path / "replay", "--variant", "decoupled_exact")
    assert found["changes"]["proximal.source"] == ["arrival", "snapshot"]
    assert not any(u["num_unlike"] for u in found["updates"])
    was, now = columns_of(run_folder, 4), columns_of(tmp_path / "replay", 4)
    fresh = was["staleness"] == 0
    assert fresh.any()
    assert (~fresh).sum() > 5
    np.testing.assert_allclose(now["logp_proximal"][fresh], was["logp_proximal"][fresh], atol=1e-5)
    assert np.abs(now["logp_proximal"] - was["logp_proximal"])[~fresh].max() > 1e-3
    from oldlogits.record.folder import RunFolder
    from oldlogits.replay.run_batches import run_batches

    config = recipe(tiny_folder)
    *_, batch = run_batches(RunFolder(path=run_folder), 0, 4, config.trainer.minibatches_per_update)
    spec = trainer_spec(config)
    at_two = Trainer(spec, run_folder / "checkpoints/v000002/model", [3, 4, 5])
    at_two.publish()
    at_two.put_batch(batch.batch)
    tokens = np.flatnonzero(was["version"] == 2)
    assert len(tokens) > 3
    np.testing.assert_allclose(now["logp_proximal"][tokens], at_two.scorer.score(tokens, None), atol=1e-5)


def test_another_number_of_steps_deals_the_groups_as_a_run_would(noisy_run, tmp_path):
    replayed(noisy_run, tmp_path / "replay", "--trainer.minibatches-per-update", "2")
    found = columns_of(tmp_path / "replay", 3)
    groups = list(dict.fromkeys(name.rpartition(".")[0] for name in found["trajectory"]))
    assert [groups.index(name.rpartition(".")[0]) % 2 for name in found["trajectory"]] == found["step"].tolist()
    assert len(groups) == 3


def test_what_is_said_fits_80_columns_and_is_written_down(noisy_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    capsys.readouterr()
    replayed(noisy_run, tmp_path / "replay", "--objective.eps-high", "0.01", "--num-updates", "2")
    shown = capsys.readouterr().out
    table = [line for line in shown.splitlines() if not line.startswith(("replay of", "starting", "model"))]
    assert max(map(len, table)) <= 80
    assert "Changed: objective.eps_high 0.28 -> 0.01." in shown
    page = (tmp_path / "replay/replay.md").read_text()
    assert page.startswith("# Replay of ")
    assert "The weights are " in page
    assert page.count("\n") > 8


def test_angles_and_distances_are_those_of_plane_geometry():
    x, y, zero = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0]), torch.zeros(2)
    assert cosine([x, x], [y, y]) == pytest.approx(math.sqrt(0.5))
    assert math.isnan(cosine([x], [zero]))
    apart = weights_apart([zero], [3 * x], [torch.tensor([0.0, 4.0])])
    assert (apart.distance, apart.moved, apart.cosine) == (5.0, 3.0, 0.0)
