"""Whole runs over stale keys and values: OLD is what the engine gave, to rounding, and never a recomputation."""

import numpy as np
import pytest

from oldlogits.runtime.run import run

from ..runs import check_accounting, recipe, summary_of, tokens_of

STALE = {"engine": {"kv": "stale", "num_slots": 8}, "source": {"accept_mixed_kv": True}}
COLUMNS = ("logp_mu", "logp_stand_in", "log_r_s", "staleness", "provenance", "trajectory", "version")


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
        assert result.summary.witness_publish_max_abs_error <= 1e-6
        assert result.summary.witness_lag0_max_abs_error <= 1e-6
        return tokens, is_mixed

    return play


@pytest.mark.parametrize("lag", ["even", "random"])
def test_old_is_what_the_engine_gave_over_entries_of_several_versions(lag, played):
    tokens, is_mixed = played(num_updates=8, trainer={"steps_per_version": 1}, runtime={"lag": lag})
    assert np.abs(tokens["logp_stand_in"] - tokens["logp_mu"]).max() <= 1e-5
    assert is_mixed.sum() > 100
    assert len(set(zip(tokens["trajectory"], tokens["version"], strict=True))) > len(set(tokens["trajectory"]))
    recomputed = np.abs(tokens["log_r_s"][is_mixed & (tokens["staleness"] == 0)])  # THETA at the version of the token
    assert recomputed.max() > 1e-2, "the entries of older versions matter, or nothing was tested"
    assert np.abs(tokens["log_r_s"][~is_mixed & (tokens["staleness"] == 0)]).max() <= 1e-5


def test_old_is_what_an_engine_process_gave(played):
    tokens, is_mixed = played(runtime={"type": "local"}, env={"max_tokens_per_turn": 40, "max_tokens": 128})
    print(is_mixed.sum(), len(is_mixed))
    assert np.abs(tokens["logp_stand_in"] - tokens["logp_mu"]).max() <= 1e-5
    assert np.abs(tokens["log_r_s"][tokens["staleness"] > 0]).max() > 1e-2, "the versions differ, or nothing was tested"
