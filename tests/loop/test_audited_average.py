"""Runs whose weight average follows their exact audit: what they measure is true, and they go on and repeat bit for bit."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from oldlogits.loop.audit import ExactAudit
from oldlogits.run.run import run
from oldlogits.versions import best_beta, measured_growth

from ..runs import assert_same_state, events_of, recipe

pytestmark = pytest.mark.slow

NUM_UPDATES, WINDOW = 8, 4


def config_of(folder: Path, share: float, reset: str = "none", **more: object):
    return recipe(
        folder,
        num_updates=NUM_UPDATES,
        variant="ppo_ewma_train_infer",
        band=1.1,
        proximal={"source": "ewma", "decay": "audited", "reset": reset},
        audit={"share": share},
        engine={"precision": "int8", "max_num_seqs": 32},
        max_staleness=WINDOW,
        lockstep={"lag": "even", "max_lag": WINDOW},
        record={"checkpoint_every": 2},
        **more,
    )


def table_of(out: Path, version: int):
    table = pq.read_table(out / f"tokens/v{version:06d}.parquet")
    return {name: table.column(name).to_numpy(zero_copy_only=False) for name in table.column_names if name != "context"}


@pytest.fixture
def olds(monkeypatch):
    """OLD of the audited batches, by the version that their update makes."""
    seen = {}

    async def score(audit, batch):
        found = await real(audit, batch)
        if found is not None:
            seen[batch.trainer_version + 1] = found
        return found

    real = ExactAudit.score
    monkeypatch.setattr(ExactAudit, "score", score)
    return seen


def test_what_is_told_of_an_audited_batch_is_true_of_its_tokens_and_beta_follows_from_it(tiny_folder, tmp_path, olds):
    out = tmp_path / "run"
    assert run(config_of(tiny_folder, 0.5), out).error is None
    assert sorted(olds) == [2, 4, 6, 8]
    counts, squares, lags, betas = np.zeros(WINDOW + 1, int), np.zeros(WINDOW + 1), [], []
    for update in events_of(out, "update"):
        table, metrics = table_of(out, update.version), update.metrics
        lags.append(np.bincount(table["staleness"], minlength=WINDOW + 1))
        told = {name for name in metrics if name.startswith("average/error")}
        assert bool(told) == (update.version in olds)
        if told:
            old = olds[update.version].old
            for lag in set(table["staleness"].tolist()):
                here = table["staleness"] == lag
                missed = [(float(x) - float(o)) ** 2 for x, o in zip(table["logp_proximal"][here], old[here], strict=True)]
                assert metrics[f"average/error_measured@lag{lag}"] == pytest.approx(np.sqrt(np.mean(missed)), abs=1e-6)
                first = here & (table["step"] == 0)
                moved = [(float(x) - float(o)) ** 2 for x, o in zip(table["logp_theta"][first], old[first], strict=True)]
                if moved:
                    assert metrics[f"average/error_live@lag{lag}"] == pytest.approx(np.sqrt(np.mean(moved)), abs=1e-6)
                counts[lag] += len(moved)
                squares[lag] += sum(moved)
        grown = measured_growth(counts, squares)
        if grown is not None:
            betas.append(metrics["average/beta"])
            assert metrics["average/exponent"] == pytest.approx(grown.exponent)
            assert betas[-1] == pytest.approx(best_beta(np.sum(lags[-4:], axis=0), grown))
    assert len(betas) > NUM_UPDATES / 2
    assert max(betas) > 0
    assert "average/error_predicted@lag1" in events_of(out, "update")[-1].metrics
    assert squares[1] > 1e-4, "log-probs have moved, or nothing was measured"


def test_a_reset_comes_after_the_audits_that_ask_for_it_and_after_no_others(tiny_folder, tmp_path, olds):
    """Active sets by hand: the band of 1.1 on X/mu, and the clip of theta/X by 0.8, 1.28 and 3."""
    out = tmp_path / "run"
    assert run(config_of(tiny_folder, 1.0, "audited"), out).error is None
    resets = {event.version: event for event in events_of(out, "average_reset")}
    assert sorted(olds) == list(range(1, NUM_UPDATES + 1))
    for version, scores in olds.items():
        table = table_of(out, version)

        def active(logp, table=table):
            log_r_s, advantage = table["logp_theta"] - logp, table["advantage"]
            clipped = (advantage > 0) & (log_r_s > np.log(1.28))
            clipped |= (advantage < 0) & ((log_r_s < np.log(0.8)) | (log_r_s > np.log(3)))
            return (np.abs(logp - table["logp_mu"]) <= np.log(1.1)) & ~clipped

        exact, weights = active(scores.old), np.exp(table["logp_theta"] - table["logp_mu"]) * np.abs(table["advantage"])
        wrong = [table["active_mask"] != exact, active(scores.live) != exact]
        by_count, by_weight = [one.mean() for one in wrong], [weights[one].sum() / weights[exact].sum() for one in wrong]
        is_worse = by_count[1] < by_count[0] and by_weight[1] < by_weight[0]
        assert is_worse == (version in resets)
        if is_worse:
            event = resets[version]
            assert event.rule == "audited"
            assert (event.error_before, event.error_after) == pytest.approx(by_count)
            assert (event.weight_error_before, event.weight_error_after) == pytest.approx(by_weight)
    assert 0 < len(resets) < NUM_UPDATES


def test_a_killed_run_goes_on_with_the_same_beta_bit_for_bit(tiny_folder, tmp_path):
    out = tmp_path / "run"
    config = config_of(tiny_folder, 0.5, "audited")
    assert run(config, out).error is None
    last = f"checkpoints/v{NUM_UPDATES:06d}"
    whole = shutil.move(out / last, tmp_path / "whole")  # as if it had been killed before it wrote it
    tables = [(out / f"tokens/v{version:06d}.parquet").read_bytes() for version in range(1, NUM_UPDATES + 1)]
    before = {event.version: average_of(event) for event in events_of(out, "update")}
    assert run(config, out, resume=True).error is None
    again = {event.version: average_of(event) for event in events_of(out, "update")}
    assert again == before
    assert tables == [(out / f"tokens/v{version:06d}.parquet").read_bytes() for version in range(1, NUM_UPDATES + 1)]
    assert_same_state(out / last / "state", Path(whole) / "state")
    assert len({figures["average/beta"] for figures in before.values() if "average/beta" in figures}) > 1


def average_of(event):
    return {name: value for name, value in event.metrics.items() if name.startswith("average/") and not name.endswith("_s")}


def test_in_processes_of_its_own_it_is_formed_too(tiny_folder, tmp_path):
    out = tmp_path / "run"
    config = config_of(tiny_folder, 1.0, "audited", runtime={"type": "local"})
    assert run(config, out).error is None
    told = [average_of(event) for event in events_of(out, "update")]
    assert all("average/error_measured" in one for one in told)
    assert "average/error_predicted" in told[-1]
