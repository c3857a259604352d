"""Dumps of frameworks become the tokens that they hold, each at its place; a stranger's file is refused by name and place."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from oldlogits.core.errors import TokenTableError
from oldlogits.doctor.readers.door import read_batches
from oldlogits.doctor.tokens import Batch

EXPORT = {
    "schema_version": 1, "step": 7, "rank": 0, "micro_step": 0, "micro_sequence_idx": 0, "export_sequence_idx": 3,
    "env_name": "e", "token_ids": [5, 6, 7], "position_ids": [0, 1, 2], "loss_mask": [False, True, True],
    "advantages": [0.0, 1.0, 1.0],
    "inference_logprobs": [0.0, -0.5, None], "trainer_logprobs": [0.0, -0.25, -1.0], "is_masked": [False, False, True],
}  # fmt: skip


def only(path: Path, *, trust: bool = False) -> Batch:
    (batch,) = read_batches([path], trust=trust)
    return batch


def lines(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_prime_rls_exports_are_read_with_their_mask_and_step(tmp_path: Path) -> None:
    (tmp_path / "token_exports" / "step_7").mkdir(parents=True)
    lines(tmp_path / "token_exports" / "step_7" / "rank_0.jsonl", EXPORT, {**EXPORT, "export_sequence_idx": 4})
    batch = only(tmp_path / "token_exports")
    table = batch.table
    assert (batch.framework, batch.source, table.trajectories) == ("prime-rl", "step_7/rank_0.jsonl", ("7-0-3", "7-0-4"))
    np.testing.assert_array_equal(table.logp_mu[:3], np.float32([0.0, -0.5, np.nan]))
    assert table.missing["logp_mu"].tolist() == [False, False, True] * 2
    assert table.columns()["kept"].tolist() == [True, True, False] * 2
    assert (table.version.tolist(), set(table.trainer_version.tolist())) == ([-1] * 6, {7})


@pytest.mark.parametrize(
    "change, said",
    [
        ({"loss_mask": [True]}, "line 1, loss_mask"),
        ({"token_ids": [5, 6, "7"]}, "line 1, token_ids"),
        ({"token_ids": [5, 6, 2**70]}, "line 1, token_ids"),
        ({"token_ids": [5, 6, -7]}, "row 3"),
        ({"token_ids": [[5], [6], [7]]}, "line 1, token_ids"),
        ({"trainer_logprobs": {"a": 1}}, "line 1, trainer_logprobs"),
        ({"step": -1}, "line 1, step"),
        ({"step": True}, "line 1, step"),
        ({"advantages": [0.0, 1.0, float("nan")]}, "line 1"),
    ],
)
def test_a_damaged_export_is_refused_by_line(tmp_path: Path, change: dict[str, object], said: str) -> None:
    with pytest.raises(TokenTableError, match=rf"rank_0\.jsonl.*{said}"):
        only(lines(tmp_path / "rank_0.jsonl", {**EXPORT, **change}))


SAMPLE = {
    "tokens": torch.tensor([9, 8, 7, 6]), "response_lengths": 2, "loss_masks": torch.tensor([1, 0], dtype=torch.int),
    "rollout_log_probs": torch.tensor([-0.5, -1.0]), "log_probs": torch.tensor([-0.25, -2.0], dtype=torch.bfloat16),
    "advantages": torch.tensor([1.0, 1.0]), "rollout_mask_sums": torch.tensor(4.0), "rollout_ids": 11,
    "weight_versions": ["3", "3"],
}  # fmt: skip


@pytest.mark.parametrize("form", ["samples", "rollout_data"])
def test_slimes_and_miles_dumps_place_the_response_behind_the_prompt(tmp_path: Path, form: str) -> None:
    path = tmp_path / "3.pt"
    listed = {key: [value, value] for key, value in SAMPLE.items()}
    torch.save({"samples": [SAMPLE, SAMPLE]} if form == "samples" else {"rollout_data": listed, "rank": 0}, path)
    table = only(path).table
    assert table.mask.tolist() == [False, False, True, False] * 2
    np.testing.assert_array_equal(table.logp_mu[:4], np.float32([np.nan, np.nan, -0.5, -1.0]))
    assert table.columns()["logp_old"][2] == np.float32(-0.25)
    assert table.columns()["loss_weight"][2] == 0.25
    assert table.version.tolist() == [-1, -1, 3, -1] * 2
    assert table.groups == ("11",)


@pytest.mark.parametrize(
    "change", [{"response_lengths": 9}, {"tokens": None}, {"log_probs": torch.zeros(3)}, {"loss_masks": torch.zeros(2, 2)}]
)
def test_a_damaged_sample_is_refused_by_number(tmp_path: Path, change: dict[str, object]) -> None:
    torch.save({"samples": [SAMPLE, {**SAMPLE, **change}]}, tmp_path / "3.pt")
    with pytest.raises(TokenTableError, match=r"3\.pt.*sample 1"):
        only(tmp_path / "3.pt")


class Thing:
    """What only a pickle can hold."""


def test_other_objects_in_a_torch_file_are_refused_without_trust(tmp_path: Path) -> None:
    path = tmp_path / "3.pt"
    torch.save({"samples": [SAMPLE], "args": Thing()}, path)
    with pytest.raises(TokenTableError, match="--trust"):
        only(path)
    assert only(path, trust=True).table.num_tokens == 4


def serialised(tensor: torch.Tensor) -> dict[str, object]:
    array = tensor.numpy()
    return {"format": "numpy", "data": array.tobytes(), "shape": array.shape, "dtype": str(array.dtype)}


def test_skyrls_dumps_are_aligned_on_the_right_and_need_trust(tmp_path: Path) -> None:
    held = {
        "sequences": torch.tensor([[0, 4, 5, 6], [1, 2, 3, 9]]), "attention_mask": torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]),
        "loss_mask": torch.tensor([[0.0, 1.0], [1.0, 1.0]]), "rollout_logprobs": torch.tensor([[0.0, -0.5], [-1.0, -2.0]]),
        "action_log_probs": torch.tensor([[0.0, -0.25], [-1.5, -2.5]]), "advantages": torch.ones(2, 2),
    }  # fmt: skip
    state = {"batch_dict": {k: serialised(v) for k, v in held.items()} | {"values": None}, "metadata": {"uids": ["a", "b"]}}
    path = tmp_path / "global_step_12_training_input.pkl"
    path.write_bytes(pickle.dumps(state))
    with pytest.raises(TokenTableError, match="--trust"):
        only(path)
    table = only(path, trust=True).table
    assert table.token_id.tolist() == [4, 5, 6, 1, 2, 3, 9]
    assert table.mask.tolist() == [False, False, True, False, False, True, True]
    np.testing.assert_array_equal(table.logp_mu[table.mask], np.float32([-0.5, -1.0, -2.0]))
    assert (set(table.trainer_version.tolist()), table.groups) == ({12}, ("a", "b"))
    state["batch_dict"]["loss_mask"]["shape"] = (7, 7)
    path.write_bytes(pickle.dumps(state))
    with pytest.raises(TokenTableError, match="loss_mask"):
        only(path, trust=True)


def trajectory(*, advantages: bool) -> dict[str, torch.Tensor]:
    """One sequence of four tokens whose last two were sampled; with advantages AReaL has moved mask and mu one forward."""
    mask, mu = torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0.0, 0.0, -0.5, -1.0]])
    found = {"input_ids": torch.tensor([[4, 5, 6, 7]]), "attention_mask": torch.ones(1, 4, dtype=torch.long), "loss_mask": mask}
    found |= {"logprobs": mu, "versions": torch.tensor([[-1, -1, 2, 3]]), "prox_logp": torch.tensor([[0.0, -0.75, -1.25, 0.0]])}
    if advantages:
        found |= {"loss_mask": mask.roll(-1, 1), "logprobs": mu.roll(-1, 1), "advantages": torch.tensor([[0.0, 1.0, 2.0, 0.0]])}
    return found


@pytest.mark.parametrize("advantages", [False, True])
def test_areals_batches_are_moved_back_to_their_tokens(tmp_path: Path, advantages: bool) -> None:
    path = tmp_path / "step_000009.pt"
    torch.save([trajectory(advantages=advantages)], path)
    table = only(path).table
    assert table.mask.tolist() == [False, False, True, True]
    np.testing.assert_array_equal(table.logp_mu[2:], np.float32([-0.5, -1.0]))
    np.testing.assert_array_equal(table.columns()["logp_old"][2:], np.float32([-0.75, -1.25]))
    assert table.version.tolist() == [-1, -1, 2, 3]
    assert set(table.trainer_version.tolist()) == {9}
    if advantages:
        assert table.columns()["advantage"][2:].tolist() == [1.0, 2.0]


TRAJECTORY = {
    "task_id": 42, "sample_idx": 0, "seqlen": 6, "prompt_len": 2, "head_version": 1, "tail_version": 2,
    "version_rle": [[1, 1], [2, 2]],
    "segments": [{"role": role, "len": num} for role, num in (("prompt", 2), ("gen", 1), ("context", 1), ("gen", 2))],
}  # fmt: skip


def test_areals_trajectories_tell_versions_and_nothing_else(tmp_path: Path) -> None:
    batch = only(lines(tmp_path / "42.jsonl", TRAJECTORY))
    assert batch.table.index.tolist() == [2, 4, 5]
    assert batch.table.version.tolist() == [1, 2, 2]
    assert batch.table.columns()["segment"].tolist() == [1, 3, 3]
    assert batch.lacks == {"token_id"}
    assert batch.table.missing["logp_mu"].all()


@pytest.mark.parametrize(
    "change",
    [{"version_rle": [[1, 5]]}, {"version_rle": [[1]]}, {"seqlen": "6"}, {"segments": [{"role": "gen", "len": 2**40}]}],
)
def test_a_damaged_trajectory_is_refused_by_line(tmp_path: Path, change: dict[str, object]) -> None:
    with pytest.raises(TokenTableError, match=r"42\.jsonl.*line 1"):
        only(lines(tmp_path / "42.jsonl", {**TRAJECTORY, **change}))


@pytest.mark.parametrize("name", ["a.pt", "a.pkl", "a.jsonl", "a.parquet", "absent.pt"])
def test_a_file_that_is_nothing_is_named(tmp_path: Path, name: str) -> None:
    if name != "absent.pt":
        (tmp_path / name).write_bytes(b"\x80\x04nothing\n")
    with pytest.raises(TokenTableError, match=name):
        read_batches([tmp_path / name], trust=True)
    with pytest.raises(TokenTableError, match="cannot read"):
        read_batches([tmp_path])
