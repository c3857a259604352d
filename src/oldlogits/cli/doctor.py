"""``oldlogits doctor FILE...``: what is wrong with the tokens of a training batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.text import Text

from oldlogits.cli.main import FAILED
from oldlogits.cli.table import INDENT, Rows, wrapped
from oldlogits.core.errors import ConfigError
from oldlogits.doctor.diagnose import Diagnosis, Examination, examine
from oldlogits.doctor.page import write_page
from oldlogits.doctor.readers.door import read_batches
from oldlogits.doctor.tokens import Settings
from oldlogits.doctor.verdicts import Outcome
from oldlogits.record.folder import write_atomic
from oldlogits.record.jsonl import encode


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorOptions:
    """Look at the tokens of training batches, and say what is wrong with them, with evidence and a remedy.

    Exit status 1: something is. Files: neutral token tables (docs/token-table.md), run folders, dumps of prime-rl, slime,
    miles, SkyRL, AReaL.
    """

    files: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Files or run folders, of one run or of several."""
    weights: Path | None = None
    """Weights of versions, to compute OLD with: a PatchStore's folder, checkpoints or a run, or adapters."""
    model: str | None = None
    """The model of a store's weights, the base of adapters, or version 0 beside checkpoints: a model folder or a run."""
    temperature: float = 1.0
    """With --weights: the temperature that tokens were sampled at, where the batch does not say."""
    framework: Literal["", "verl", "TRL", "AReaL", "prime-rl", "SkyRL", "slime", "miles", "oldlogits"] = ""
    """Whose keys remedies name, where the file does not say."""
    json: Path | None = None
    """Write all verdicts there as JSON."""
    page: Path | None = None
    """Write a page there: one HTML file."""
    trust: bool = False
    """Unpickle files that need it; unpickling runs whatever code a file names."""
    eps_low: float | None = None
    """The clip's lower half-width."""
    eps_high: float | None = None
    """The clip's upper half-width."""
    dual_clip: float | None = None
    """The largest ratio for A < 0; inf: none."""
    band: float | None = None
    """The band on r_d, above 1."""
    denominator: Literal["", "token-mean", "token-mean-kept", "sequence-mean", "group-mean", "constant"] = ""
    """What the loss is said to divide by."""


def command(arguments: Sequence[str]) -> int:
    """Examine the files, show the verdicts; returns 1 where there is a finding."""
    o = tyro.cli(DoctorOptions, prog="oldlogits doctor", args=list(arguments))
    if not o.files:
        raise ConfigError("there is nothing to examine", got="no file", allowed="at least one", fix="oldlogits doctor FILE...")
    batches = read_batches(o.files, trust=o.trust, with_context=o.weights is not None)
    batches = [dataclasses.replace(batch, framework=batch.framework or o.framework) for batch in batches]
    found = examine(batches, _settings(o), weights=o.weights, model=o.model, temperature=o.temperature)
    if o.json is not None:
        write_atomic(o.json, encode(found.as_json()) + "\n")
    if o.page is not None:
        write_page(o.page, found)
    console = Console(highlight=False)
    _show(console, found)
    return FAILED if found.findings else 0


def _settings(o: DoctorOptions) -> Settings:
    """What was said of the training.

    Raises:
        ConfigError: A bound is out of range.
    """
    above = {"eps_low": 0, "eps_high": 0, "dual_clip": 1, "band": 1, "temperature": 0}
    stated = {name: value for name in above if (value := getattr(o, name)) is not None}
    for name, value in stated.items():
        if not value > above[name]:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{flag} is out of range", got=str(value), allowed=f"above {above[name]}", fix=f"correct {flag}")
    del stated["temperature"]
    return Settings(**stated, denominator=o.denominator, stated=bool(stated))


def _show(console: Console, found: Examination) -> None:
    """The table of checks, what was computed with weights, and the findings with their remedies."""
    for note in found.notes:
        console.print(Text("\n".join(wrapped(note, console.width))))
    console.print(Rows(("check", "verdict", "tokens"), [_row(group) for group in found.by_check().values()]))
    if found.lags:
        console.print(Rows(("lag", "tokens", "|log r_d|", "|log r_s|", "changed", "weight"), found.lag_rows()))
    unknown = {name: group[0].verdict.says for name, group in found.by_check().items() if _worst(group) == "cannot-tell"}
    for name, says in unknown.items():
        console.print(Text("\n".join(wrapped(f"cannot tell: {name}: {says}", console.width, later=INDENT))))
    told: dict[str, Diagnosis] = {}
    for one in found.findings:
        console.print(Text(f"\n{one.check}" + (f"  {one.source}" if one.source else ""), style="bold red"))
        lines = [one.verdict.says, *([f"tokens: {', '.join(one.verdict.where)}"] if one.verdict.where else [])]
        first = told.setdefault(one.remedy, one)
        lines.append(f"remedy: {one.remedy if first is one else f'that of {first.check}'}")
        console.print(Text("\n".join(line for text in lines for line in wrapped(text, console.width, indent=INDENT))))
    num = len(found.findings)
    said = f"\n{num} finding{'s' * (num > 1)}" if num else "nothing found"
    console.print(f"{said}; {len(unknown)} check{'s' * (len(unknown) != 1)} cannot tell from these files")


def _row(group: Sequence[Diagnosis]) -> tuple[str, str, str]:
    """A line of the table: the worst verdict of a check over all files."""
    worst = _worst(group)
    count = sum(one.verdict.outcome == worst for one in group)
    some = f" ({count} of {len(group)} files)" if count < len(group) else ""
    num = sum(one.verdict.num_tokens for one in group if one.verdict.outcome == "finding")
    return group[0].check, worst.replace("-", " ") + some, f"{num:,}" if num else ""


def _worst(group: Sequence[Diagnosis]) -> Outcome:
    """The verdict of a check over all files: a finding in any; else healthy, if any file can tell."""
    return min((one.verdict.outcome for one in group), key=("finding", "healthy", "cannot-tell").index)
