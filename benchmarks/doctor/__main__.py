"""``python -m benchmarks.doctor``: every check on healthy batches and on those with its fault."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import tyro

from benchmarks.doctor.faults import FAULTS, Fault
from benchmarks.doctor.world import BAND, DUAL, EPS_HIGH, EPS_LOW, Setting, make_world
from oldlogits.doctor.diagnose import diagnose
from oldlogits.doctor.tokens import Settings

PAGE: Final = Path(__file__).parents[2] / "docs" / "doctor.md"
BEGIN, END = "<!-- matrix -->\n", "<!-- end of the matrix -->"
SETTINGS: Final = Settings(eps_low=EPS_LOW, eps_high=EPS_HIGH, dual_clip=DUAL, band=BAND, stated=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Plant faults in generated batches, and count which of them the doctor finds."""

    num_batches: int = 200
    """Healthy batches, on which every check has to be silent."""
    num_planted: int = 40
    """Batches of each fault."""
    write: bool = False
    """Write the table into docs/doctor.md."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """How often a fault was found, and where it was not."""

    fault: Fault
    num: int
    missed: tuple[str, ...]


def false_alarms(num_batches: int, settings: Settings = SETTINGS) -> list[str]:
    """The findings on healthy batches."""
    found = []
    for seed in range(num_batches):
        world = make_world(Setting.draw(seed))
        wrong = (one for one in diagnose([world.batch(world.columns())], settings) if one.verdict.outcome == "finding")
        found += [f"{one.check}: {one.verdict.says} ({world.setting})" for one in wrong]
    return found


def matrix(num_planted: int) -> list[Row]:
    """How often each fault is found."""
    rows = []
    for fault in FAULTS:
        missed = []
        for seed in range(num_planted):
            setting = Setting.draw(1000 + seed, **({"lag": fault.lag} if fault.lag else {}))
            verdicts = [one.verdict for one in diagnose(fault.plant(setting), SETTINGS) if one.check == fault.check]
            if all(verdict.outcome != "finding" for verdict in verdicts):
                missed.append(f"{setting}: {verdicts[0].says}")
        rows.append(Row(fault=fault, num=num_planted, missed=tuple(missed)))
    return rows


def table(rows: list[Row], alarms: list[str], num_batches: int) -> str:
    """The matrix as Markdown."""
    lines = ["| check | planted fault | found | false alarms |", "| --- | --- | --- | --- |"]
    for row in rows:
        false = sum(alarm.startswith(row.fault.check + ":") for alarm in alarms)
        lines.append(
            f"| `{row.fault.check}` | {row.fault.what} | {row.num - len(row.missed)} of {row.num} | {false} of {num_batches} |"
        )
    found = sum(row.num - len(row.missed) for row in rows)
    total = sum(row.num for row in rows)
    lines.append(f"| all | | {found:,} of {total:,} ({found / total:.1%}) | {len(alarms)} of {num_batches} batches |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    """Print the matrix and what was missed; returns 1 where a healthy batch has a finding, or less than 95% is found."""
    options = tyro.cli(Options, args=arguments)
    alarms = false_alarms(options.num_batches)
    rows = matrix(options.num_planted)
    text = table(rows, alarms, options.num_batches)
    print(text, *alarms, *(f"missed {row.fault.check}: {said}" for row in rows for said in row.missed), sep="\n")
    if options.write:
        page = PAGE.read_text(encoding="utf-8")
        head, rest = page.split(BEGIN)
        PAGE.write_text(head + BEGIN + text + END + rest.split(END)[1], encoding="utf-8")
    found = sum(row.num - len(row.missed) for row in rows)
    return int(bool(alarms) or found < 0.95 * sum(row.num for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
