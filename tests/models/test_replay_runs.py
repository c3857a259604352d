"""Whole runs of a mixture of experts whose engine routes otherwise than the trainer."""

import shutil
from dataclasses import asdict

import numpy as np
import pyarrow.parquet as pq
import pytest

from oldlogits.cli.main import run as command
from oldlogits.config.load import config_from_table
from oldlogits.core.errors import ConfigError
from oldlogits.run.run import run

from ..runs import assert_same_state, check_accounting, events_of, recipe, tokens_of, write_recipe

COLUMNS = ("logp_mu", "logp_proximal", "log_r_s", "staleness", "provenance", "token_id")


def played(folder, out, routing, **sections):
    """A run of a mixture: its tokens, and the metrics of its updates."""
    config = recipe(folder, **{**sections, "model": {"routing": routing, **sections.get("model", {})}})
    result = run(config, out)
    assert result.error is None
    check_accounting(out)
    return tokens_of(out, *COLUMNS), [event.metrics for event in events_of(out, "update")], result.summary


@pytest.mark.slow
def test_recorded_routing_changes_no_bit_of_a_run_and_replayed_routing_brings_old_nearer_to_the_engine(
    tiny_moe_folder, tmp_path
):
    sections = {"engine": {"precision": "int4"}, "num_updates": 3, "trainer": {"layout": "packed"}}
    off, free, _ = played(tiny_moe_folder, tmp_path / "off", "off", **sections)
    recorded, compared, _ = played(tiny_moe_folder, tmp_path / "recorded", "recorded", **sections)
    replayed, followed, summary = played(tiny_moe_folder, tmp_path / "replayed", "replayed", **sections)
    assert all(np.array_equal(off[name], recorded[name]) for name in COLUMNS)
    assert_same_state(tmp_path / "off/checkpoints/v000003/state", tmp_path / "recorded/checkpoints/v000003/state")
    routing = {"scored_other_choices", "scored_other_tokens"}
    assert not any(name.startswith("routing/") for metrics in free for name in metrics)
    for metrics in compared:
        assert {name.removeprefix("routing/") for name in metrics if name.startswith("routing/")} == routing
        assert 0 < metrics["routing/scored_other_choices"] <= metrics["routing/scored_other_tokens"] < 0.3
    for metrics in followed:
        assert metrics["routing/scored_other_tokens"] > 0
        assert metrics["routing/theta_other_tokens"] > 0
        assert "consistency/num_lag0_above" not in metrics, "nothing is excused"
    first = len(pq.read_table(tmp_path / "off/tokens/v000001.parquet"))
    assert np.array_equal(off["token_id"][:first], replayed["token_id"][:first])
    mismatch = [np.abs(tokens["logp_proximal"] - tokens["logp_mu"])[:first].mean() for tokens in (off, replayed)]
    assert mismatch[1] < 0.95 * mismatch[0]
    assert summary.consistency_lag0_max_abs_error <= 1e-6


WAYS = {
    "snapshot": {},
    "eager": {"proximal": {"source": "eager"}},
    "interruption": {"proximal": {"source": "interruption"}},
    "dedicated": {"proximal": {"source": "dedicated"}},
    "stale": {"engine": {"kv": "stale", "max_num_seqs": 48}, "proximal": {"accept_mixed_kv": True}},
    "bf16": {"model": {"forward_dtype": "bf16"}, "engine": {"precision": "bf16"}},
    "recomputed": {"trainer": {"activation_checkpointing": True, "minibatches_per_update": 2}},
    "local": {"runtime": {"type": "local"}, "env": {"latency_s": 0.25}},
    "serve": {
        "engine": {"type": "vllm", "server": "embedded"},
        "runtime": {"type": "local"},
        "env": {"latency_s": 0.25},
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_over_the_engines_own_experts_old_is_what_the_engine_gave_on_every_way(way, tiny_moe_folder, tmp_path):
    tokens, metrics, summary = played(tiny_moe_folder, tmp_path / "run", "replayed", num_updates=6, **WAYS[way])
    assert np.abs(tokens["logp_proximal"] - tokens["logp_mu"]).max() <= 1e-5
    assert set(tokens["staleness"].tolist()) == {0, 1, 2}
    assert summary.consistency_lag0_max_abs_error <= 1e-6
    assert max(m["routing/theta_other_tokens"] for m in metrics) > 0.1, "the weights move, or nothing was tested"
    if way != "dedicated":  # whose scorer counts in another process
        assert max(m["routing/scored_other_tokens"] for m in metrics) == 0
    if way == "stale":
        assert set(tokens["provenance"]) == {"exact", "mixed_kv"}


@pytest.mark.slow
@pytest.mark.parametrize("source", ["snapshot", "eager"])
def test_a_killed_run_goes_on_with_the_experts_of_what_was_in_flight(source, tiny_moe_folder, tmp_path):
    out, more = tmp_path / "run", {"record": {"checkpoint_every": 2}, "lockstep": {"lag": "random"}}
    config = recipe(
        tiny_moe_folder, proximal={"source": source}, model={"routing": "replayed"}, engine={"precision": "int4"}, **more
    )
    assert command(["train", str(write_recipe(tmp_path / "r.toml", config)), "--out", str(out)]) == 0
    whole = shutil.move(out / "checkpoints/v000004", tmp_path / "whole")  # as if it had been killed before the last one
    before = [pq.read_table(out / f"tokens/v{version:06d}.parquet").to_pydict() for version in range(1, 5)]
    assert command(["train", "--resume", str(out)]) == 0
    again = [pq.read_table(out / f"tokens/v{version:06d}.parquet").to_pydict() for version in range(1, 5)]
    assert again == before
    assert_same_state(out / "checkpoints/v000004/state", whole / "state")


def test_what_cannot_be_replayed_is_refused_before_a_run(tiny_folder, tmp_path):
    table = asdict(recipe(tiny_folder, model={"routing": "replayed"}))
    with pytest.raises(ConfigError, match=r"routers.*model\.routing = 'off'"):
        run(config_from_table(table), tmp_path / "run")
