"""Runs of a top-1 mixture of experts: two engines that agree, and versions that are exact."""

from __future__ import annotations

import numpy as np
import pytest

from oldlogits.run.run import run

from ..runs import check_accounting, events_of, recipe, tokens_of


@pytest.mark.slow
@pytest.mark.parametrize("numerics", ["fp32", "fp8"])
def test_every_version_is_what_was_published_and_in_fp32_the_engines_agree_across_updates(tiny_moe_folder, numerics, tmp_path):
    config = recipe(tiny_moe_folder, engine={"precision": numerics}, num_updates=3)
    assert (
        run(config, tmp_path / "run").error is None
    )  # the probe, and the consistency check at lag 0, stop a run that is not exact
    check_accounting(tmp_path / "run")
    assert len(events_of(tmp_path / "run", "probe")) == 1 + config.num_updates
    tokens = tokens_of(tmp_path / "run", "logp_mu", "logp_proximal", "staleness")
    assert set(tokens["staleness"].tolist()) == {0, 1, 2}
    log_r_d = np.abs(tokens["logp_proximal"] - tokens["logp_mu"])
    assert log_r_d.max() <= 1e-5 if numerics == "fp32" else log_r_d.mean() > 1e-3
