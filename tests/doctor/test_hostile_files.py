"""Files that a stranger made: each is one error that names the file and the place, and costs no more than it holds."""

import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from oldlogits.core.errors import TokenTableError
from oldlogits.doctor.readers.door import read_batches

from .test_readers import EXPORT, SAMPLE, lines, only, trajectory

ROW = {"trajectory": "a", "index": 1, "token_id": 3, "mask": True, "version": 1, "trainer_version": 1, "logp_mu": -0.5}

ODD: dict[str, Callable[[], torch.Tensor]] = {
    "sparse": lambda: torch.tensor([-0.5, -1.0]).to_sparse(),
    "without data": lambda: torch.zeros(2, device="meta"),
    "complex": lambda: torch.tensor([-0.5, 1j]),
    "nested": lambda: torch.nested.as_nested_tensor([torch.zeros(1), torch.zeros(2)]),
    "one value for a trillion": lambda: torch.zeros(1).expand(2**40),
}


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
@pytest.mark.parametrize("kind", ODD)
def test_a_tensor_without_an_array_is_refused_by_sample(tmp_path: Path, kind: str) -> None:
    torch.save({"samples": [SAMPLE, {**SAMPLE, "log_probs": ODD[kind]()}]}, tmp_path / "3.pt")
    with pytest.raises(TokenTableError, match=r"3\.pt.*sample 1, log_probs"):
        only(tmp_path / "3.pt")


@pytest.mark.parametrize("given", [torch.tensor(float("nan")), torch.tensor(float("inf")), torch.tensor(1j), 1.5, float("nan")])
def test_a_length_that_is_no_whole_number_is_refused(tmp_path: Path, given: object) -> None:
    torch.save({"samples": [{**SAMPLE, "loss_masks": None, "response_lengths": given}]}, tmp_path / "3.pt")
    with pytest.raises(TokenTableError, match="sample 0, response_lengths"):
        only(tmp_path / "3.pt")


@pytest.mark.parametrize("mask", [[float("nan"), 1.0], [2, 0], [0.5, 1.0], [-1, 1]])
def test_a_mask_holds_zeros_and_ones_alone(tmp_path: Path, mask: list[float]) -> None:
    torch.save({"samples": [{**SAMPLE, "loss_masks": torch.tensor(mask)}]}, tmp_path / "3.pt")
    with pytest.raises(TokenTableError, match="sample 0, loss_masks"):
        only(tmp_path / "3.pt")


@pytest.mark.parametrize("extra", [torch.tensor(1.0), {"a": 1, "b": 2}, {1, 2}])
def test_what_is_no_list_of_samples_is_left_out_of_them(tmp_path: Path, extra: object) -> None:
    listed = {key: [value, value] for key, value in SAMPLE.items()}
    torch.save({"rollout_data": {**listed, "extra": extra}}, tmp_path / "3.pt")
    assert only(tmp_path / "3.pt").table.num_tokens == 8


@pytest.mark.parametrize("versions", [torch.tensor([-1, -1, 2, 3]), [[-1, -1, 2, 3]], torch.zeros(2, 4, dtype=torch.long)])
def test_a_column_of_another_form_is_refused_and_not_left_out(tmp_path: Path, versions: object) -> None:
    torch.save([{**trajectory(advantages=False), "versions": versions}], tmp_path / "step_000009.pt")
    with pytest.raises(TokenTableError, match="trajectory 0, versions"):
        only(tmp_path / "step_000009.pt")


def test_a_torch_file_with_compressed_entries_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    torch.save({"samples": [{**SAMPLE, "tokens": torch.zeros(1 << 20, dtype=torch.long)}]}, tmp_path / "3.pt")
    with zipfile.ZipFile(tmp_path / "3.pt") as whole, zipfile.ZipFile(tmp_path / "4.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in whole.infolist():
            packed.writestr(entry.filename, whole.read(entry.filename))
    assert (tmp_path / "4.pt").stat().st_size < 1 << 16
    with pytest.raises(TokenTableError, match=r"4\.pt.*compressed"):
        only(tmp_path / "4.pt")


def test_kept_of_some_sequences_is_kept_of_none(tmp_path: Path) -> None:
    """A table has it for every token or for none: what was not recorded must not be read as kept."""
    without = {key: value for key, value in EXPORT.items() if key != "is_masked"} | {"export_sequence_idx": 4}
    for number, records in enumerate(([EXPORT, without], [without, EXPORT])):
        table = only(lines(tmp_path / f"rank_{number}.jsonl", *records)).table
        assert table.kept is None


@pytest.mark.parametrize("text", ['"step": 7, "step": 8', '"step": 7, "advantages": [0.0, 1e999, 1.0]'])
def test_an_export_with_a_key_twice_or_a_number_out_of_range_is_refused_by_line(tmp_path: Path, text: str) -> None:
    path = lines(tmp_path / "rank_0.jsonl", EXPORT, {key: v for key, v in EXPORT.items() if key not in ("advantages",)})
    path.write_text(path.read_text().rstrip().removesuffix("}") + f", {text}}}\n")
    with pytest.raises(TokenTableError, match=r"rank_0\.jsonl: line 2"):
        only(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".pt", ".pkl"])
def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path: Path, suffix: str) -> None:
    os.mkfifo(tmp_path / f"pipe{suffix}")
    (tmp_path / f"endless{suffix}").symlink_to("/dev/zero")
    (tmp_path / f"folder{suffix}").mkdir()
    for name, said in (
        ("pipe", "no regular file"),
        ("endless", "no regular file"),
        ("folder", "a folder"),
        ("a" * 300, "too long"),
    ):
        with pytest.raises(TokenTableError, match=said):
            read_batches([tmp_path / f"{name}{suffix}"], trust=True)


@pytest.mark.parametrize(
    "name",
    [b'"\xff"', b'"\\ud800"', b'"b", "trajectory": "c"', '"ä"'.encode("latin-1")],
    ids=["bytes", "half", "twice", "latin"],
)
def test_a_name_that_is_no_text_is_refused_by_its_row(tmp_path: Path, name: bytes) -> None:
    rows = [json.dumps({**ROW, "index": index}).encode() for index in range(3)]
    rows[1] = rows[1].replace(b'"a"', name)
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(rows) + b"\n")
    with pytest.raises(TokenTableError, match=r"x\.jsonl: row 2 is damaged"):
        read_batches([tmp_path / "x.jsonl"])
