"""Whole runs in one process: repeatable, lags as asked for, exact old logits."""

import functools
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from oldlogits.loop import reference as reference_module
from oldlogits.record.event_log import EventLog
from oldlogits.run.run import run
from tests.memory_log import without_wall_clock

from ..runs import assert_same_state, check_accounting, events_of, recipe, summary_of, tokens_of

TOLERANCE = 1e-4
"""Nats: what two fp32 engines may differ by (the probe)."""

LAGS = ("fresh_first", "even", "skewed", "random")


@pytest.fixture(scope="module")
def trained(tiny_folder, tmp_path_factory):
    """Run a recipe once for all tests of this file; returns its folder."""
    root = tmp_path_factory.mktemp("lockstep")

    @functools.cache
    def train(lag: str, *, seed: int = 0, copy: int = 0, num_updates: int = 6) -> Path:
        out = root / f"{lag}-{seed}-{copy}-{num_updates}"
        config = recipe(tiny_folder, seed=seed, num_updates=num_updates, lockstep={"lag": lag})
        result = run(config, out)
        assert result.error is None
        return out

    return train


def weights_of(out: Path) -> bytes:
    [checkpoint] = (out / "checkpoints").iterdir()
    return (checkpoint / "model" / "model.safetensors").read_bytes()


def lines_of(path: Path) -> list[object]:
    return [without_wall_clock(json.loads(line)) for line in path.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("lag", ["even", "random"])
def test_the_same_seed_gives_the_same_run_bit_for_bit(trained, lag):
    first, again = trained(lag), trained(lag, copy=1)
    assert weights_of(first) == weights_of(again)
    states = [run / "checkpoints/v000006/state" for run in (first, again)]
    assert len({(state / "trainer.json").read_bytes() for state in states}) == 1
    assert_same_state(*states)
    assert lines_of(first / "events.jsonl") == lines_of(again / "events.jsonl")
    assert lines_of(first / "episodes.jsonl") == lines_of(again / "episodes.jsonl")
    tables = sorted(path.name for path in (first / "tokens").iterdir())
    assert tables == [f"v{version:06d}.parquet" for version in range(1, 7)]
    for name in tables:
        assert (first / "tokens" / name).read_bytes() == (again / "tokens" / name).read_bytes()
    assert without_wall_clock(summary_of(first)) == without_wall_clock(summary_of(again))


@pytest.mark.slow
def test_another_seed_gives_another_run(trained):
    assert weights_of(trained("even")) != weights_of(trained("even", seed=1))


@pytest.mark.slow
def test_every_update_moves_the_weights(trained):
    """Else every other law here would hold for want of trying."""
    norms = [event.metrics["grad/norm"] for event in events_of(trained("even"), "update")]
    assert len(norms) == 6
    assert min(norms) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("lag", LAGS)
def test_staleness_stays_within_the_window_and_is_spread_as_the_lag_says(trained, lag):
    tokens = tokens_of(trained(lag), "staleness", "trainer_version", "version", "trajectory")
    assert (tokens["trainer_version"] - tokens["version"] == tokens["staleness"]).all()
    settled = tokens["trainer_version"] >= 2  # before, no token can be two versions old
    share = np.bincount(tokens["staleness"][settled], minlength=3) / settled.sum()
    assert len(share) == 3, "the window is 2"
    if lag == "fresh_first":
        assert share[2] == 0
        assert min(share[:2]) > 0.1
    elif lag == "even":
        assert min(share) > 0.2
    elif lag == "skewed":
        assert share[0] > 0.5 > share[1] > share[2] > 0
    else:
        assert min(share) > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("lag", LAGS)
def test_in_fp32_every_trained_token_is_exact_though_trajectories_span_versions(trained, lag):
    out = trained(lag)
    tokens = tokens_of(out, "log_r_d", "logp_mu", "logp_proximal", "trajectory", "version", "provenance")
    spans = [len(set(tokens["version"][tokens["trajectory"] == name])) for name in sorted(set(tokens["trajectory"]))]
    assert len(spans) == 6 * 3 * 4
    assert sum(n >= 2 for n in spans) >= len(spans) / 4
    assert np.abs(tokens["log_r_d"]).max() <= TOLERANCE
    assert np.abs(tokens["logp_proximal"] - tokens["logp_mu"]).max() <= TOLERANCE
    assert set(tokens["provenance"]) == {"exact"}
    summary = summary_of(out)
    assert summary["num_multi_version_trajectories"] == sum(n >= 2 for n in spans)
    assert summary["log_r_d_max_abs"] == pytest.approx(np.abs(tokens["log_r_d"]).max(), rel=1e-5)
    assert summary["consistency_publish_max_abs_error"] <= 1e-5
    assert summary["consistency_lag0_max_abs_error"] <= 1e-5
    assert check_accounting(out)["trained"] == 6 * 3 * 4


@pytest.mark.slow
def test_one_version_tag_that_is_off_by_one_is_seen_in_r_d(tiny_folder, tmp_path, monkeypatch):
    """The tokens of one trajectory's oldest version are tagged one too high, in one batch."""
    collate, shifted = reference_module.collate, []

    def collate_wrongly(groups, advantages, *, num_steps):
        batch = collate(groups, advantages, num_steps=num_steps)
        if shifted or max(batch.versions) < 2:
            return batch
        rows = [slice(a, b) for a, b in zip(batch.starts[:-1], batch.starts[1:], strict=True)]
        row = next(r for r in rows if len(set(batch.version[r][batch.loss_mask[r]])) > 1)
        version = batch.version.copy()
        oldest = batch.version[row][batch.loss_mask[row]].min()
        version[row][batch.version[row] == oldest] = oldest + 1
        shifted.append(int((version != batch.version).sum()))
        return replace(batch, version=version)

    monkeypatch.setattr(reference_module, "collate", collate_wrongly)
    run(recipe(tiny_folder, lockstep={"lag": "even"}), tmp_path / "run")
    wrong = np.abs(tokens_of(tmp_path / "run", "log_r_d")["log_r_d"]) > TOLERANCE
    [num_shifted] = shifted
    assert 0 < wrong.sum() <= num_shifted
    assert summary_of(tmp_path / "run")["log_r_d_max_abs"] > 10 * TOLERANCE


@pytest.mark.slow
def test_at_lag_0_the_proximal_policies_of_snapshot_and_arrival_coincide(tiny_folder, tmp_path):
    pairs = {"snapshot": "decoupled_exact", "arrival": "decoupled_async"}
    for source, variant in pairs.items():
        config = recipe(
            tiny_folder,
            num_updates=3,
            variant=variant,
            proximal={"source": source},
            lockstep={"max_lag": 0},
            engine={"precision": "int8"},
        )
        run(config, tmp_path / source)
    assert weights_of(tmp_path / "snapshot") == weights_of(tmp_path / "arrival")
    assert np.abs(tokens_of(tmp_path / "arrival", "log_r_d")["log_r_d"]).max() > TOLERANCE, "the discrepancy was real"


def test_an_environment_that_always_fails_ends_the_run_with_its_reason(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("oldlogits.rollout.watches.WINDOW", 8)
    monkeypatch.setattr("tests.runs.Words.reset", lambda self, start: {}["shop"])
    for name, eval_episodes in (("before", 16), ("training", 0)):
        result = run(recipe(tiny_folder, eval={"num_episodes": eval_episodes}), tmp_path / name)
        assert result.summary.ended == "error"
        assert re.search(r"5 of the last 5 .* by their environment; got: the last: reset: KeyError: 'shop'", str(result.error))
        [ended] = events_of(tmp_path / name, "run_ended")
        assert ended.reason == "error"
        assert (tmp_path / name / "report.html").stat().st_size > 1000
        check_accounting(tmp_path / name)
    failed = events_of(tmp_path / "training", "trajectory_failed")
    assert {event.reason for event in failed} == {"reset: KeyError: 'shop'"}


@pytest.mark.slow
def test_an_interruption_between_any_two_moments_leaves_whole_updates(tiny_folder, tmp_path):
    """Wherever the signal falls, the checkpoint, the events and the summary tell of the same updates."""
    import os
    import signal

    kinds = {
        "batch": "batch",
        "scored": "scored",
        "published": "published",
        "updated": "update",
    }
    original = EventLog.emit
    for moment, (name, kind) in enumerate(kinds.items()):
        out, seen = tmp_path / name, []

        def interrupt(self, event, kind=kind, seen=seen):
            if event.kind is kind:
                seen.append(1)
                if len(seen) == 3:
                    os.kill(os.getpid(), signal.SIGINT)
            return original(self, event)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(EventLog, "emit", interrupt)
            result = run(recipe(tiny_folder, num_updates=6), out)
        num_updates = result.summary.num_updates
        assert result.summary.ended == "interrupted", moment
        assert num_updates == {"batch": 3, "scored": 3, "published": 2, "updated": 3}[name]
        assert [event.version for event in events_of(out, "update")] == list(range(1, num_updates + 1))
        [checkpoint] = (out / "checkpoints").iterdir()
        assert json.loads((checkpoint / "state/trainer.json").read_text())["version"] == num_updates
        assert checkpoint.name == f"v{num_updates:06d}"
        account = check_accounting(out)
        assert account["trained"] == num_updates * 3 * 4
        assert account["cancelled"] > 0
