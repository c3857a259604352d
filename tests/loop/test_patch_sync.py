"""Weights that travel as patches: the engine and the dedicated scorer hold the bits that the trainer published."""

import numpy as np
import pytest

from oldlogits.cli.main import run as command
from oldlogits.core.errors import ReceiverBehindError
from oldlogits.versions import HostCopy

from ..runs import events_of, recipe, summary_of, tokens_of, write_recipe

STILL = {"runtime": {"type": "local"}, "trainer": {"lr": 3e-10, "warmup_steps": 0}, "eval": {"num_episodes": 0}}
"""Steps so small that few of the fp32 values change from one version to the next, as in bf16 at the usual learning rates."""


def trained(tiny_folder, tmp_path, **more):
    config = recipe(tiny_folder, **{**STILL, "num_updates": 5, **more})
    assert command(["train", str(write_recipe(tmp_path / "r.toml", config)), "--out", str(tmp_path / "run")]) == 0
    return tmp_path / "run"


@pytest.mark.slow
@pytest.mark.parametrize("route", ["snapshot", "dedicated"])
def test_versions_reach_the_engine_as_patches_and_old_logits_stay_exact(tiny_folder, tmp_path, route, shared_files):
    files = shared_files()
    out = trained(tiny_folder, tmp_path, proximal={"source": route})
    sent = [dict(event.recorded()) for event in events_of(out, "weights_updated")]
    assert [fields["sent"] for fields in sent] == ["full"] + ["patch"] * 5
    assert all(0 < fields["bytes"] < 0.5 * sent[0]["bytes"] and not fields["refused"] for fields in sent[1:])
    stored = [dict(event.recorded()) for event in events_of(out, "published")]
    assert all(0 <= fields["changed"] < 0.5 for fields in stored[1:])
    assert max(fields["changed"] for fields in stored[1:]) > 0.001
    summary = summary_of(out)
    assert (summary["num_patch_syncs"], summary["num_full_syncs"], summary["num_refused_patches"]) == (5, 1, 0)
    assert summary["version_bytes_mean"] == pytest.approx(np.mean([fields["version_bytes"] for fields in stored[1:]]))
    assert summary["version_share_of_copy"] == summary["version_share_of_average"] < 0.5
    copies = max(fields["bytes"] for fields in stored) / stored[0]["version_bytes"]
    assert summary["trainer_copies_max"] == pytest.approx(1 + copies)  # the live weights and the store
    assert 1 <= copies < 2
    assert summary["engine_copies_max"] == 2  # the host's and the engine's
    assert summary["consistency_publish_max_abs_error"] <= 1e-5
    assert summary["consistency_lag0_max_abs_error"] <= 1e-5
    assert summary["probe_max_abs_error"] <= 1e-5
    tokens = tokens_of(out, "log_r_d", "provenance")
    assert set(tokens["provenance"]) == {"exact"}
    assert np.abs(tokens["log_r_d"]).max() <= 1e-4
    assert shared_files() <= files


@pytest.mark.slow
def test_a_refused_patch_is_followed_by_full_weights_and_counted(tiny_folder, tmp_path, monkeypatch):
    taken = HostCopy.take

    def take(self, patches, base, version):
        if version == 2:
            raise ReceiverBehindError("a patch that was lost", got="nothing", allowed="a patch", fix="send full weights")
        return taken(self, patches, base, version)

    monkeypatch.setattr(HostCopy, "take", take)
    out = trained(tiny_folder, tmp_path)
    sent = [dict(event.recorded()) for event in events_of(out, "weights_updated")]
    assert [fields["sent"] for fields in sent] == ["full", "patch", "full", "patch", "patch", "patch"]
    assert "a patch that was lost" in sent[2]["refused"]
    assert summary_of(out)["num_refused_patches"] == 1
    assert summary_of(out)["probe_max_abs_error"] <= 1e-5


@pytest.mark.slow
def test_full_weights_are_sent_where_the_recipe_wants_them_and_where_all_values_change(tiny_folder, tmp_path):
    out = trained(tiny_folder, tmp_path, engine={"weight_sync": "full"})
    assert {event.sent for event in events_of(out, "weights_updated")} == {"full"}
    (tmp_path / "second").mkdir()
    moving = trained(tiny_folder, tmp_path / "second", trainer={"lr": 1e-3, "warmup_steps": 0})
    sent = [event.sent for event in events_of(moving, "weights_updated")]
    changed = [event.changed for event in events_of(moving, "published")]
    assert max(changed[1:]) > 0.9
    assert all(kind == "full" for kind, share in zip(sent, changed, strict=True) if share > 0.9)


@pytest.mark.slow
def test_versions_over_the_budget_lie_in_the_run_folder(tiny_folder, tmp_path):
    out = trained(tiny_folder, tmp_path, trainer={"lr": 1e-3, "warmup_steps": 0}, versions={"budget_bytes": 1000})
    assert any((out / "versions").iterdir())
    summary = summary_of(out)
    assert summary["provenance"].keys() == {"exact"}
    assert summary["consistency_publish_max_abs_error"] <= 1e-5
