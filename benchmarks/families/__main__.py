"""Prints what trainer, chat format, checkpoints and engines make of a small random model of each family, one row a family.

    python -m benchmarks.families [--only NAME ...] [--vllm PYTHON] [--write docs/models.md]

`--vllm` names an interpreter that has vLLM (`make test-vllm` installs one) and trains each family for three updates on a real
server, which takes about a minute; without it that cell is left as it is on the page. `--write` puts the rows on a page, in
place of those of the same families.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
import torch
from transformers.utils import logging

from benchmarks.families.checks import Checked, plain_logps, tools_in
from benchmarks.families.folders import write_folder
from benchmarks.families.served import embedded_error, train_on_vllm
from benchmarks.families.shapes import FAMILIES
from oldlogits.core.errors import ModelFolderError
from oldlogits.models.load import read_model_config

COLUMNS: Final = (
    *("family", "`model_type`", "trainer, nats", "bf16 weights, nats", "packing noise: mean, largest"),
    *("layout", "checkpoint", "`model.chat_tools`", "embedded engine", "vLLM"),
)
NOT_RUN: Final = "not run"


def row(name: str, folder: Path, vllm: str) -> list[str]:
    """Return the cells of a family, whose model is written to a folder."""
    family, path = FAMILIES[name], folder / "model"
    write_folder(family, path)
    checked, rounded = Checked(path), Checked(path, "bf16")
    error = np.abs(checked.scored() - plain_logps(path, checked.batch)).max()
    bf16 = np.abs(rounded.scored() - plain_logps(path, checked.batch, forward_dtype="bf16")).max()
    noise = checked.noise()
    checked.update()
    now = checked.scored()
    is_same = all(np.array_equal(again, now) for again in checked.reloaded(folder / "checkpoint"))
    return [
        name,
        f"`{read_model_config(path).model_type}`",
        _rounded(error),
        _rounded(bf16),
        f"{_rounded(noise.mean)}, {_rounded(noise.largest)}",
        f"padded: {why.partition(',')[0]}" if (why := checked.trainer.live.padded_because) else "shared",
        "same bits" if is_same else "OTHER BITS",
        f'"{place}"' if (place := tools_in(path, family.chat.kwargs)[0]) else "no format",
        _embedded(path),
        _vllm(name, folder, vllm) if vllm else NOT_RUN,
    ]


def _embedded(path: Path) -> str:
    try:
        return _rounded(embedded_error(path))
    except ModelFolderError as error:
        found = re.search(r"got: (.*?) in /", str(error))
        return f"refused: `{found[1] if found else error}`"


def _vllm(name: str, folder: Path, python: str) -> str:
    chat = FAMILIES[name].chat
    if not chat.tools_in:
        return "no format"
    try:
        run = train_on_vllm(folder / "model", chat, python, folder / "run")
    except RuntimeError:
        return "failed"
    return f"{_rounded(max(run.probes))}, {_rounded(run.largest)}"


def _rounded(value: float) -> str:
    return f"{value:.0e}"


def rows_of(page: str) -> Iterator[list[str]]:
    """Yield the rows of the table on a page, without its head."""
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and len(cells) == len(COLUMNS) and cells[0] in FAMILIES:
            yield cells


def as_line(cells: list[str]) -> str:
    """Return a row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the table, and put it on a page if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=tuple(FAMILIES), default=tuple(FAMILIES), metavar="NAME")
    parser.add_argument("--vllm", default="", metavar="PYTHON")
    parser.add_argument("--write", type=Path, metavar="PAGE")
    options = parser.parse_args()
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(as_line(list(COLUMNS)), as_line(["---"] * len(COLUMNS)), sep="\n")
    for name in options.only:
        with tempfile.TemporaryDirectory(prefix="family-") as folder:
            cells = row(name, Path(folder), options.vllm)
        page = options.write.read_text(encoding="utf-8") if options.write else ""
        for before in (found for found in rows_of(page) if found[0] == name):
            cells[-1] = before[-1] if cells[-1] == NOT_RUN else cells[-1]
            page = re.sub(rf"^\| {re.escape(name)} \|.*$", lambda _: as_line(cells), page, flags=re.MULTILINE)  # noqa: B023
        if options.write:
            options.write.write_text(page, encoding="utf-8")
        print(as_line(cells), flush=True)


if __name__ == "__main__":
    main()
