"""Runs of a top-1 mixture of experts: two engines that agree, and versions that are exact."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from oldlogits.models.tiny import TinyMoeSize, save_tiny, tiny_model, tiny_tokenizer
from oldlogits.record.bus import EventKind
from oldlogits.run.run import run

from ..conftest import WORDS
from ..runs import check_accounting, events_of, recipe, tokens_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer mixture whose experts matter."""
    folder = tmp_path_factory.mktemp("moe")
    tokenizer = tiny_tokenizer(WORDS)
    size = TinyMoeSize(hidden=32, layers=2, heads=2, kv_heads=1, mlp=48, max_context=128)
    model = tiny_model(size, len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id, seed=0)
    for layer in model.model.layers:
        layer.mlp.gate.weight.data *= 10
        layer.mlp.experts.down_proj.data *= 10
    save_tiny(folder, model, tokenizer)
    return folder


@pytest.mark.parametrize("numerics", ["fp32", "fp8"])
def test_every_version_is_what_was_published_and_in_fp32_the_engines_agree_across_updates(folder, numerics, tmp_path):
    config = recipe(folder, engine={"precision": numerics}, num_updates=3)
    assert run(config, tmp_path / "run").error is None  # the probe, and the witness at lag 0, stop a run that is not exact
    check_accounting(tmp_path / "run")
    assert len(events_of(tmp_path / "run", EventKind.PROBE)) == 1 + config.num_updates
    tokens = tokens_of(tmp_path / "run", "logp_mu", "logp_prox", "staleness")
    assert set(tokens["staleness"].tolist()) == {0, 1, 2}
    log_r_d = np.abs(tokens["logp_prox"] - tokens["logp_mu"])
    assert log_r_d.max() <= 1e-5 if numerics == "fp32" else log_r_d.mean() > 1e-3
