"""Replays of neutral token tables, and what is said where one does not hold enough."""

from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from oldlogits.batch.token_table import TokenTable, write_token_table
from oldlogits.cli.main import run as command
from oldlogits.core.errors import ReplayError
from oldlogits.replay.table_batches import table_batches

from .runs import recorded, replayed


def table_of(run_folder, updates) -> TokenTable:
    """The rows of a run's token tables as a neutral table, context included; each name says its update."""
    rows: dict[str, list] = {name: [] for name in ("trajectory", "index", "token_id", "mask", "version", "trainer_version")}
    rows |= {name: [] for name in ("logp_mu", "logp_old", "logp_theta", "advantage", "group", "temperature")}
    for update in updates:
        before = None
        for row in pq.read_table(run_folder / f"tokens/v{update:06d}.parquet").to_pylist():
            follows = rows["index"][-1] + 1 if before == row["trajectory"] else 0
            before = row["trajectory"]
            for at, token in enumerate([*row["context"], row["token_id"]], start=follows):
                is_trained = at == row["index"]
                values = {
                    "trajectory": f"{update}/{before}",
                    "index": at,
                    "token_id": token,
                    "mask": is_trained,
                    "version": row["version"] if is_trained else -1,
                    "trainer_version": row["trainer_version"] if is_trained else -1,
                    "logp_old": row["logp_proximal"],
                    "group": f"{update}/{before.partition('.')[0]}",
                }
                for name in rows:
                    rows[name].append(values[name] if name in values else row[name])
    floats = ("logp_mu", "logp_old", "logp_theta", "advantage", "temperature")
    return TokenTable.of({name: np.array(v, np.float32 if name in floats else None) for name, v in rows.items()})


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_a_table_of_another_trainer_is_trained_as_the_run_was(tiny_folder, tmp_path, suffix):
    # The model of the run is that of its table; later versions are not: the replay has its own optimizer.
    run_folder = recorded(tiny_folder, tmp_path / "run", trainer={"lr": 1e-2, "warmup_steps": 0, "minibatches_per_update": 1})
    path = tmp_path / f"tokens.{suffix}"
    write_token_table(path, table_of(run_folder, [1, 2]))
    words = ["--model.path", str(tiny_folder), "--trainer.lr", "1e-2", "--trainer.warmup-steps", "0"]
    found = replayed(path, tmp_path / "replay", *words)
    of_run = replayed(run_folder, tmp_path / "again", "--num-updates", "2")
    assert not found["is_run"]
    assert not found["changes"]
    for one, other in zip(found["updates"], of_run["updates"], strict=True):
        assert one["num_tokens"] == other["num_tokens"] > 100
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert one["num_active"] == other["num_active"]
        assert one["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-3)
        assert one["logp_unlike_max"] < 1e-4
    write_token_table(path, table_of(run_folder, [2, 4]))  # updates that are no neighbours, under an average
    apart = replayed(path, tmp_path / "apart", *words, "--variant", "ppo_ewma_train_infer")
    assert [one["version"] for one in apart["updates"]] == [2, 4]
    asked = replayed(path, tmp_path / "async", *words, "--variant", "decoupled_async", "--num-updates", "1")
    assert asked["recipe"]["source"] == "arrival"
    assert len(asked["updates"]) == 1


def made(**columns) -> TokenTable:
    """Two trajectories of three tokens, the last two of each trained."""
    given = {
        "trajectory": np.array(["a"] * 3 + ["b"] * 3),
        "index": np.array([0, 1, 2] * 2),
        "token_id": np.arange(6),
        "mask": np.array([False, True, True] * 2),
        "version": np.array([-1, 3, 4, -1, 4, 5]),
        "trainer_version": np.array([-1, 5, 5] * 2),
        "logp_mu": np.full(6, -1.0),
        "advantage": np.array([1.0] * 3 + [-2.0] * 3),
        **columns,
    }
    return TokenTable.of({name: values for name, values in given.items() if values is not None})


def test_the_batch_of_a_table_is_that_of_its_rows():
    [found] = table_batches(made(group=np.array(["g"] * 6), temperature=np.full(6, 0.5)), "f")
    batch = found.in_steps(2).batch
    assert batch.token_ids.tolist() == list(range(6))
    assert batch.starts.tolist() == [0, 3, 6]
    assert batch.loss_mask.tolist() == [False, True, True] * 2
    assert batch.version.tolist() == [-1, 3, 4, -1, 4, 5]
    assert batch.temperature.tolist() == [1, 0.5, 0.5] * 2
    assert batch.logp_mu.tolist() == [0, -1, -1] * 2
    assert batch.advantages.tolist() == [1, -2]
    assert batch.trajectory_ids == ("a", "b")
    assert (found.version, found.oldest, batch.step.tolist()) == (5, 3, [0, 0])
    [apart] = table_batches(made(), "f")
    assert apart.in_steps(2).batch.step.tolist() == [0, 1], "without groups each trajectory is one"


def test_updates_are_told_apart_by_their_trainer_version():
    found = table_batches(made(trainer_version=np.array([-1, 7, 7, -1, 5, 5])), "f")
    assert [(one.version, one.batch.trajectory_ids) for one in found] == [(5, ("b",)), (7, ("a",))]


NAN = np.full(6, np.nan)


@pytest.mark.parametrize(
    "columns, what",
    [
        ({"mask": np.zeros(6, np.bool_)}, "no token is trained.*fix: set mask = true"),
        ({"index": np.array([0, 1, 2, 0, 2, 3])}, r"tokens before it are missing; got: b\[2\].*write the context too"),
        ({"mask": np.array([True, True, True, False, True, True])}, r"a first token is trained.*got: a\[0\].*its prompt"),
        ({"version": np.full(6, -1)}, r"its version is missing; got: a\[1\]"),
        ({"trainer_version": np.full(6, -1)}, "its trainer_version is missing"),
        ({"version": np.full(6, 9)}, "its version is newer than its trainer_version"),
        ({"advantage": None}, "its advantage is missing.*write the advantage of each trained token"),
        ({"trainer_version": np.array([-1, 5, 6, -1, 5, 5])}, "a trajectory is of two updates"),
        ({"advantage": np.array([1.0, 1, 1, -2, -2, np.inf])}, r"its advantage is not finite; got: b\[2\]"),
        ({"advantage": np.array([9.0, 1, 1, 9, -2, -3])}, r"not that of its trajectory's other tokens.*got: b\[2\].*\(GAE\)"),
    ],
)
def test_what_is_missing_is_named_with_its_remedy(columns, what):
    with pytest.raises(ReplayError, match=f"table.jsonl does not hold all that an update reads: .*{what}"):
        table_batches(made(**columns), "table.jsonl")


def test_a_missing_log_prob_is_refused_and_one_that_is_not_a_number_is_kept_for_the_loss_to_leave_out():
    whole = made(logp_mu=np.array([-1, -1, np.nan, -1, -1, -1]))
    [batch] = table_batches(whole, "f")
    assert np.isnan(batch.batch.logp_mu[2])
    marks = {"logp_mu": np.isnan(whole.logp_mu)}
    with pytest.raises(ReplayError, match=r"its logp_mu is missing; got: a\[2\]"):
        table_batches(replace(whole, missing=marks), "f")


@pytest.mark.slow
def test_a_debug_dump_of_slime_is_trained_as_the_doctor_reads_it(tiny_folder, tmp_path, capsys):
    sample = {
        "tokens": [3, 4, 5, 6],
        "response_lengths": 2,
        "loss_masks": torch.tensor([1, 1]),
        "rollout_log_probs": torch.tensor([-3.5, -4.0]),
        "log_probs": torch.tensor([-3.4, -4.1]),
        "advantages": torch.tensor([1.0, 1.0]),
        "rollout_ids": 11,
        "weight_versions": ["3"],
    }
    samples = [sample, {**sample, "advantages": torch.tensor([-1.0, -1.0]), "weight_versions": ["4"]}]
    torch.save({"samples": samples}, tmp_path / "3.pt")
    found = replayed(tmp_path / "3.pt", tmp_path / "replay", "--model.path", str(tiny_folder))
    assert "taken to begin with the newest version of its tokens" in capsys.readouterr().out
    [one] = found["updates"]
    assert (one["version"], one["num_tokens"]) == (5, 4)
    table = pq.read_table(tmp_path / "replay/tokens/v000005.parquet").to_pydict()
    assert table["staleness"] == [1, 1, 0, 0]
    np.testing.assert_allclose(table["logp_proximal"], [-3.4, -4.1] * 2, atol=1e-6)
    r_d, r_s = np.exp(table["log_r_d"]), np.exp(np.subtract(table["logp_theta"], table["logp_proximal"]))
    advantage = np.array([1, 1, -1, -1])
    kept = np.where(advantage > 0, np.minimum(r_s, 1.28), np.clip(r_s, 0.8, 3.0))
    assert one["loss"] == pytest.approx(-(r_d * advantage * kept).mean(), rel=1e-5)


def refused(capsys, *words) -> str:
    assert command(["replay", *map(str, words)]) == 2
    return capsys.readouterr().err


@pytest.mark.slow
def test_a_table_needs_a_model_and_the_old_logits_of_its_variant(tiny_folder, tmp_path, capsys):
    path = tmp_path / "t.parquet"
    write_token_table(path, made())
    assert "pass --model.path FOLDER" in refused(capsys, path, "--out", tmp_path / "o")
    words = (path, "--out", tmp_path / "o", "--model.path", tiny_folder)
    said = refused(capsys, *words)
    assert "needs log-probs of OLD, and the table has no column logp_old" in said
    assert "--variant decoupled_async" in said
    write_token_table(path, made(token_id=np.array([1, 2, 3, 4, 5, 4_000_000])))
    said = refused(capsys, *words, "--variant", "decoupled_async")
    assert "tokens that the model does not have" in said
    assert "token ids 1 .. 4000000" in said
    assert "a replay samples nothing" in refused(capsys, *words, "--objective.advantage", "mean-only")
    assert "the table does not hold these updates" in refused(capsys, *words, "--num-updates", "2")
    assert "only a run has checkpoints to start at" in refused(capsys, *words, "--start-at", "1")
    path.write_bytes(b"PAR1 no table")
    assert "is no token table" in refused(capsys, *words)
