"""Whole runs over stale keys and values: OLD is what the engine gave, to rounding, and not a recomputation."""

import numpy as np
import pytest

from oldlogits.run.run import run

from ..runs import check_accounting, events_of, recipe, summary_of, tokens_of

STALE = {"engine": {"kv": "stale", "max_num_seqs": 48}, "proximal": {"accept_mixed_kv": True}}
COLUMNS = ("logp_mu", "logp_proximal", "log_r_s", "staleness", "provenance", "trajectory", "version")


@pytest.fixture
def played(tiny_folder, tmp_path):
    """Run a recipe with stale keys and values: its tokens, and which of them are mixed."""

    def play(**sections):
        out = tmp_path / "run"
        result = run(recipe(tiny_folder, **STALE, **sections), out)
        assert result.error is None
        check_accounting(out)
        tokens = tokens_of(out, *COLUMNS)
        is_mixed = tokens["provenance"] == "mixed_kv"
        assert min(is_mixed.sum(), (~is_mixed).sum()) > 0
        assert summary_of(out)["provenance"] == {"exact": (~is_mixed).sum(), "mixed_kv": is_mixed.sum()}
        assert result.summary.consistency_publish_max_abs_error <= 1e-6
        assert result.summary.consistency_lag0_max_abs_error <= 1e-6
        return tokens, is_mixed

    return play


@pytest.mark.slow
@pytest.mark.parametrize("lag", ["even", "random"])
def test_old_is_what_the_engine_gave_over_entries_of_several_versions(lag, played):
    tokens, is_mixed = played(num_updates=8, trainer={"minibatches_per_update": 1}, lockstep={"lag": lag})
    assert np.abs(tokens["logp_proximal"] - tokens["logp_mu"]).max() <= 1e-5
    assert is_mixed.sum() > 100
    assert len(set(zip(tokens["trajectory"], tokens["version"], strict=True))) > len(set(tokens["trajectory"]))
    recomputed = np.abs(tokens["log_r_s"][is_mixed & (tokens["staleness"] == 0)])  # THETA at the version of the token
    assert recomputed.max() > 1e-2, "the entries of older versions matter, or nothing was tested"
    assert np.abs(tokens["log_r_s"][~is_mixed & (tokens["staleness"] == 0)]).max() <= 1e-5


@pytest.mark.slow
def test_the_referees_old_is_that_of_the_engines_own_entries(tiny_folder, tmp_path):
    sections = {"variant": "ppo_clip_train_infer", "proximal": {"source": "none"}, "audit": {"share": 1.0}}
    assert run(recipe(tiny_folder, engine=STALE["engine"], **sections), tmp_path / "run").error is None
    refereed = [dict(event.recorded()) for event in events_of(tmp_path / "run", "audit")]
    assert sum(sum(fields["num_compared"]) for fields in refereed) > 500
    assert max(max(fields["logp_error"]) for fields in refereed) <= 1e-4, "mu is OLD, whatever it attended to"


@pytest.mark.slow
def test_old_is_what_an_engine_process_gave(played):
    tokens, _ = played(runtime={"type": "local"}, env={"latency_s": 0.25})  # replies are slower than updates
    assert np.abs(tokens["logp_proximal"] - tokens["logp_mu"]).max() <= 1e-5
    assert np.abs(tokens["log_r_s"][tokens["staleness"] > 0]).max() > 1e-2, "the versions differ, or nothing was tested"
