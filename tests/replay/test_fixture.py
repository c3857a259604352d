"""A recorded run as a fixture of somebody else's test: token tables are read with pyarrow, and what they say holds in torch."""

import math
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from .runs import recorded

pytestmark = pytest.mark.slow


def trajectories(path):
    """The ten lines of docs/replay.md: token ids, and the rows of the trained tokens, by trajectory in the batch's order."""
    found = {}
    for row in pq.read_table(path).to_pylist():
        ids, rows = found.setdefault(row["trajectory"], ([], []))
        ids += [*row["context"], row["token_id"]]
        rows.append(row)
        assert row["index"] == len(ids) - 1
    return found


def column(rows, name):
    return torch.tensor([row[name] for row in rows], dtype=torch.float64)


def test_the_ten_lines_are_those_of_the_page(tmp_path, tiny_folder):
    page = (Path(__file__).parents[2] / "docs/replay.md").read_text()
    code = page.partition("```python\n")[2].partition("```")[0]
    assert len(code.strip().splitlines()) <= 10
    run_folder = recorded(tiny_folder, tmp_path / "run")
    space = {}
    exec(code.replace("RUN", str(run_folder)), space)
    assert space["found"] == trajectories(run_folder / "tokens/v000001.parquet")
    assert len(space["found"]) == 12


def test_the_tables_hold_the_whole_objective_of_every_update(tiny_folder, tmp_path):
    run_folder = recorded(tiny_folder, tmp_path / "run", engine={"precision": "int4", "max_num_seqs": 32}, band=1.02)
    num_masked = 0
    for version in range(1, 5):
        rows = [row for _, rows in trajectories(run_folder / f"tokens/v{version:06d}.parquet").values() for row in rows]
        mu, old, theta = (column(rows, name) for name in ("logp_mu", "logp_proximal", "logp_theta"))
        log_r_d, log_r_s, advantage = old - mu, theta - old, column(rows, "advantage")
        torch.testing.assert_close(log_r_d, column(rows, "log_r_d"), atol=1e-6, rtol=0)
        torch.testing.assert_close(log_r_s, column(rows, "log_r_s"), atol=1e-6, rtol=0)
        in_band = log_r_d.abs() <= math.log(1.02)
        clipped = ((advantage > 0) & (log_r_s.exp() > 1.28)) | ((advantage < 0) & ((log_r_s.exp() < 0.8) | (log_r_s.exp() > 3)))
        assert (in_band == column(rows, "band_mask").bool()).double().mean() > 0.99  # a bound may round either way
        assert (~clipped == column(rows, "clip_mask").bool()).double().mean() > 0.99
        num_masked += int((~in_band).sum())
    assert num_masked > 10


def test_old_log_probs_are_those_of_a_plain_forward_pass_at_the_version_of_each_token(tiny_folder, tmp_path):
    """transformers only loads the model of a checkpoint; ids, versions and temperature are all from the table."""
    from transformers import AutoModelForCausalLM

    run_folder = recorded(tiny_folder, tmp_path / "run", lockstep={"max_lag": 2, "tokens_per_version": 6, "lag": "random"})
    folders = {0: tiny_folder, 2: run_folder / "checkpoints/v000002/model"}
    models = {version: AutoModelForCausalLM.from_pretrained(folder) for version, folder in folders.items()}
    checked = dict.fromkeys(models, 0)
    for version in range(1, 5):
        for ids, rows in trajectories(run_folder / f"tokens/v{version:06d}.parquet").values():
            for row in rows:
                if row["version"] in models and row["staleness"]:
                    before = torch.tensor([ids[: row["index"]]])
                    with torch.no_grad():
                        logits = models[row["version"]](before).logits[0, -1].float() / row["temperature"]
                    assert logits.log_softmax(0)[row["token_id"]].item() == pytest.approx(row["logp_proximal"], abs=1e-5)
                    checked[row["version"]] += 1
    assert min(checked.values()) > 5
