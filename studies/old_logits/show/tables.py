"""All tables of a study, and the terminal's way to show them."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from studies.old_logits.layout import Table
from studies.old_logits.results import Study
from studies.old_logits.show.completeness import completeness
from studies.old_logits.show.cost_tables import cost_tables
from studies.old_logits.show.decision_tables import decision_tables
from studies.old_logits.show.learning_tables import learning_tables


def tables_of(study: Study) -> list[Table]:
    """Every table, part after part; each is computed from the study alone."""
    return [*learning_tables(study), *decision_tables(study), *cost_tables(study), completeness(study)]


def print_tables(tables: Sequence[Table], console: Console | None = None) -> None:
    """Print tables to the terminal, each part under its heading; details are left to page and document."""
    console = console or Console()
    part = ""
    for table in tables:
        if table.is_detail:
            continue
        if table.part != part:
            part = table.part
            console.rule(Text(part, style="bold"), align="left")
        console.print(table.rich())
