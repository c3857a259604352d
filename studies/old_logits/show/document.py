"""``study.md``: a study as a document for people, written from ``study.json`` alone."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from oldlogits.record.folder import write_atomic
from studies.old_logits.layout import Table, counted
from studies.old_logits.results import Declaration, Study
from studies.old_logits.show.completeness import missing
from studies.old_logits.show.learning_tables import VIEW_NAMES
from studies.old_logits.show.page import origin
from studies.old_logits.show.reading import plain_reading
from studies.old_logits.show.tables import tables_of


def write_document(study: Study, path: Path) -> Path:
    """Write the document; returns its path."""
    write_atomic(path, "\n\n".join(_blocks(study)) + "\n")
    return path


def _blocks(study: Study) -> Iterator[str]:
    yield f"# {study.title}"
    yield f"{origin(study)}. Written by `python -m studies.old_logits study.json`; the figures choose the sentences."
    gaps = missing(study)
    if gaps:
        yield "## Missing\n\n" + _list(gaps)
    yield "## Plain reading"
    for section in plain_reading(study):
        yield f"### {section.heading}\n\n" + _list(section.sentences)
    if study.notes.strip():
        yield "## Commentary\n\n*Written by a person; not computed.*"
        yield study.notes.strip()
    yield "## What was declared\n\n" + _list([*declared(study.declaration), *amended(study)])
    for part, tables in groupby(tables_of(study), key=lambda table: table.part):
        yield f"## {part}"
        for table in tables:
            yield _folded(table) if table.is_detail else table.markdown()


def declared(declaration: Declaration) -> Iterator[str]:
    """The plan in sentences."""
    regimes = [regime.name for regime in declaration.regimes if not regime.exploratory]
    others = [regime.name for regime in declaration.regimes if regime.exploratory]
    pairs = ", ".join(" - ".join(pair) for pair in declaration.contrasts)
    yield (
        f"Tests: {pairs} in {', '.join(regimes)}: {counted(len(regimes) * len(declaration.contrasts), 'contrast')} of final "
        f"success {VIEW_NAMES[declaration.primary]}, over {counted(declaration.num_blocks, 'block')}, each with its own warm "
        "start and seed; Holm over these."
    )
    yield (
        f"Methods: {', '.join(declaration.methods)}. Those outside of the tests run in "
        f"{counted(declaration.num_exploratory_blocks, 'block')} and are exploratory"
        + (f", as is all of {', '.join(others)}." if others else ".")
    )
    cross = declaration.cross
    if cross.windows:
        bands = ", ".join(f"{band:g}" for band in cross.bands)
        yield (
            f"Decision errors: windows {', '.join(map(str, cross.windows))}; lags {', '.join(cross.lags)}; engines "
            f"{', '.join(cross.engines)}; bands {bands}; {counted(cross.num_traces, 'trace')} each."
        )
    if declaration.routes:
        yield f"System cost: {', '.join(declaration.routes)}."


def amended(study: Study) -> Iterator[str]:
    """What was declared late, or otherwise than at first."""
    return (f"Changed: {sentence}" for sentence in study.amendments)


def _folded(table: Table) -> str:
    return f"<details>\n<summary>{table.title}</summary>\n\n{table.markdown()}\n\n</details>"


def _list(lines: Iterator[str] | tuple[str, ...] | list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
