"""Reports of other trainers' users: the doctor finds in what their own package makes what the report says, and else nothing."""

import asyncio
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from areal.api.cli_args import InferenceEngineConfig
from areal.infra.workflow_executor import WorkflowExecutor

from oldlogits.cli.main import run as command
from oldlogits.doctor.readers.door import read_batches
from reports import areal_1569, tiny_versions, trl_6945, verl_7196

pytestmark = pytest.mark.peers


def findings(path, folder):
    """What the doctor's command finds in a file: what it says, by check."""
    status = command(["doctor", str(path), "--json", str(folder / "found.json")])
    verdicts = json.loads((folder / "found.json").read_text())["verdicts"]
    found = {one["check"]: one for one in verdicts if one["outcome"] == "finding"}
    assert status == bool(found)
    return found


def test_trls_asynchronous_loss_has_both_ratios_in_one_and_with_make_exact_nothing_is_found(tmp_path):
    found = findings(trl_6945.train(tmp_path / "as-is", right=False), tmp_path)
    assert found.keys() == {"old-is-mu", "missing-old"}
    assert found["old-is-mu"]["num_tokens"] == trl_6945.GROUPS * trl_6945.IN_GROUP * trl_6945.TURNS * trl_6945.TOKENS
    assert findings(trl_6945.train(tmp_path / "right", right=True), tmp_path) == {}


def test_verls_bypass_mode_hides_the_mismatch_and_exact_old_log_probs_do_not(tmp_path, transfer_queue):
    found = findings(verl_7196.train(tmp_path / "as-is", right=False), tmp_path)
    assert found.keys() == {"old-is-mu"}
    assert found["old-is-mu"]["num_tokens"] == tiny_versions.NUM_VERSIONS * verl_7196.ROLLOUTS * 2 * verl_7196.PIECE
    assert findings(verl_7196.train(tmp_path / "right", right=True), tmp_path) == {}


def test_areals_labels_are_a_round_trip_late_and_those_of_the_server_are_not(tmp_path):
    found = findings(areal_1569.train(tmp_path / "as-is", right=False), tmp_path)
    assert found.keys() == {"labels-late", "stale-cache"}  # older weights than the label's are what a stale cache is, too
    assert found["labels-late"]["num_tokens"] == 3 * areal_1569.ROLLOUTS * areal_1569.TOKENS  # the second turns
    assert findings(areal_1569.train(tmp_path / "right", right=True), tmp_path) == {}


def test_the_tables_of_trls_trainer_hold_what_its_loss_was_of(tmp_path):
    path = trl_6945.train(tmp_path, right=True)
    (batch,) = read_batches([path])
    columns, tiny = batch.table.columns(), tiny_versions.TinyVersions()
    starts = batch.table.starts
    for i in range(0, len(starts) - 1, 7):
        place = slice(starts[i], starts[i + 1])
        ids, mask, version = (columns[name][place] for name in ("token_id", "mask", "version"))
        assert columns["index"][place].tolist() == list(range(len(ids)))
        for name, models in (("logp_old", version), ("logp_theta", np.full(len(ids), 3))):
            for one in set(models[mask].tolist()):
                with torch.no_grad():
                    rows = tiny.models[one](torch.from_numpy(ids.astype(np.int64))[None]).logits[0, :-1].log_softmax(-1)
                wanted = rows.gather(1, torch.from_numpy(ids[1:, None].astype(np.int64)))[:, 0].numpy()
                where = mask[1:] & (models[1:] == one)
                np.testing.assert_allclose(columns[name][place][1:][where], wanted[where], atol=1e-5)
        assert 0 < np.abs(columns["logp_mu"] - columns["logp_old"])[place][mask].max() < 0.2
    assert set(columns["trainer_version"].tolist()) == {3}
    assert columns["loss_weight"][columns["mask"]].sum() == pytest.approx(1, abs=1e-4)


def test_areals_own_dump_of_trajectories_says_that_it_cannot_tell_their_oldest_version(tmp_path):
    """AReaL pull request 1350: `head_version` is always -1, for the least is taken over the prompt's tokens, too."""
    config = InferenceEngineConfig(experiment_name="e", trial_name="t", fileroot=str(tmp_path), dump_to_file=True)
    executor = WorkflowExecutor.__new__(WorkflowExecutor)
    executor.config, executor._tokenizer = config, SimpleNamespace(decode=lambda ids, **_: str(ids))
    config.tokenizer_path = "tiny"
    ids, mask = torch.arange(3, 11)[None], torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    versions = torch.where(mask.bool(), torch.tensor([[-1] * 3 + [4, 4, 4, 5, 5]]), -1)
    trajectory = {"input_ids": ids, "loss_mask": mask, "versions": versions, "rewards": torch.ones(1)}
    done, why = asyncio.run(executor._dump_trajectory(trajectory | {"attention_mask": torch.ones_like(ids)}, 7, False))
    assert done, why
    (path,) = tmp_path.rglob("7.jsonl")
    assert path.parent.name == "5"
    (batch,) = read_batches([path])
    assert batch.framework == "AReaL"
    assert batch.table.index.tolist() == [3, 4, 5, 6, 7]
    assert (batch.table.version == -1).all()
    found = findings(path, tmp_path)
    assert found.keys() == {"versions-impossible"}
    assert "head_version is -1 in 1 of 1" in found["versions-impossible"]["says"]
