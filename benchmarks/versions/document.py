"""The figures as they stand in docs/versions.md: a table for each model, a column for each learning rate."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from benchmarks.versions.bars import ANY, QUANTITIES, Model, figure, rate
from benchmarks.versions.rows import Report, Row
from oldlogits.core.errors import ConfigError

BEGIN: Final = "<!-- figures: python -m benchmarks.versions --document docs/versions.md -->"
END: Final = "<!-- end of figures -->"
"""Between these lines of a document stand the tables."""

_TITLES: Final[dict[Model, str]] = {
    "synthetic": "Synthetic steps",
    "smollm2": "SmolLM2-135M-Instruct, real AdamW steps",
    "gpu": "Synthetic steps on an accelerator",
}


def markdown(report: Report) -> str:
    """Machine and tables."""
    parts = [_machine(report)]
    for model, title in _TITLES.items():
        rows = {(row.quantity, row.lr): row for row in report.rows if row.model == model}
        if rows:
            parts.append(_table(f"{title}, {next(iter(rows.values())).num_params / 1e6:,.0f} M parameters", rows))
    return "\n\n".join(parts) + "\n"


def write_into(document: Path, report: Report) -> None:
    """Write the tables between the marks of a document, in place of those there.

    Raises:
        ConfigError: See `split_at_marks`.
    """
    before, after = split_at_marks(document)
    document.write_text(f"{before}{BEGIN}\n\n{markdown(report)}\n{END}{after}", encoding="utf-8")


def split_at_marks(document: Path) -> tuple[str, str]:
    """What stands before and after the marks of a document.

    Raises:
        ConfigError: There is no such document, or it has no marks.
    """
    text = document.read_text(encoding="utf-8") if document.is_file() else ""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ConfigError(
            "the document has no place for the figures",
            got=str(document),
            allowed=f"a file with the lines {BEGIN} and {END}",
            fix="leave --document out, and write the figures with --out",
        )
    return before, after


def _machine(report: Report) -> str:
    machine = report.machine
    num_bars = sum(row.bar is not None for row in report.rows)
    return (
        f"{machine.device} ({' '.join(machine.features)}), one thread of {machine.num_cores} cores, load {machine.load:.1f} "
        f"at the start; {machine.software}; kernels: {machine.fast_path}. {report.took_s:.0f} s; "
        f"{num_bars - len(report.missed)} of {num_bars} bars met."
    )


def _table(title: str, rows: dict[tuple[str, float], Row]) -> str:
    lrs = sorted({lr for _, lr in rows if lr != ANY})
    lines = [f"| {title} | {' | '.join(map(rate, lrs))} |", f"| --- |{' ---: |' * len(lrs)}"]
    for quantity in QUANTITIES:
        of = [rows.get((quantity.name, lr), rows.get((quantity.name, ANY)) if lr == lrs[0] else None) for lr in lrs]
        if any(of):
            lines.append(f"| {quantity.label} | {' | '.join(map(_cell, of))} |")
    return "\n".join(lines)


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    value = figure(row.median, row.of.unit)
    if row.bar is None:
        return value
    return f"{value} ({'<=' if row.is_met else '**missed**: <='} {figure(row.bar, row.of.unit)})"
