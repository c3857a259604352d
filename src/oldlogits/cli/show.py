"""``oldlogits show variants | recipe | RUN``: print tables of this package, or the summary of a run."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Final

import tyro
from rich.console import Console
from rich.table import Table

from oldlogits.config.schema import RunConfig
from oldlogits.core.errors import ConfigError
from oldlogits.core.policies import EXPERIMENTAL_VARIANTS, VARIANTS
from oldlogits.core.source import sources_for


@dataclass(frozen=True, slots=True, kw_only=True)
class ShowOptions:
    """Print the variants, every recipe key, or the summary of a run."""

    what: Annotated[str, tyro.conf.Positional]
    """variants | recipe | a run folder."""
    markdown: bool = False
    """Print tables as Markdown: what README.md and docs/ hold."""


def command(arguments: Sequence[str]) -> int:
    """Print what was asked for."""
    options = tyro.cli(ShowOptions, prog="oldlogits show", args=list(arguments))
    console = Console()
    if options.what in TABLES:
        table = TABLES[options.what]
        console.print(table.markdown() if options.markdown else table.rich(), markup=False, soft_wrap=options.markdown)
    elif (folder := Path(options.what)).is_dir():
        from oldlogits.record.live import print_summary
        from oldlogits.record.summary import Summary

        if not (folder / "summary.json").is_file():
            raise ConfigError(
                "this folder has no summary", got=str(folder), allowed="a run folder", fix="let the run end first"
            )
        print_summary(Summary.read(folder / "summary.json"), folder, console=console)
    else:
        raise ConfigError(
            "nothing of that name to show",
            got=options.what,
            allowed=f"{', '.join(TABLES)}, or a run folder",
            fix="choose one of these",
        )
    return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """A table: columns and rows, shown in the terminal or as Markdown."""

    title: str
    columns: tuple[str, ...]
    rows: Callable[[], Iterator[tuple[str, ...]]]

    def rich(self) -> Table:
        """For the terminal."""
        table = Table(title=self.title)
        for index, column in enumerate(self.columns):
            table.add_column(column, overflow="fold", no_wrap=index == 0)
        for row in self.rows():
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """For a document."""
        lines = [self.columns, ("---",) * len(self.columns), *self.rows()]
        return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def variant_rows() -> Iterator[tuple[str, ...]]:
    """Name, r_d, r_s, total ratio, sources, remark of every variant."""
    for name, variant in {**VARIANTS, **EXPERIMENTAL_VARIANTS}.items():
        remarks = [] if variant.corrects_mismatch else ["mismatch uncorrected"]
        remarks += ["experimental"] if name in EXPERIMENTAL_VARIANTS else []
        yield (
            name,
            str(variant.r_d),
            str(variant.r_s),
            str(variant.total),
            ", ".join(sources_for(name)) or "-",
            ", ".join(remarks),
        )


def recipe_rows() -> Iterator[tuple[str, ...]]:
    """Dotted key, default and meaning of every recipe key."""

    def walk(value: object, prefix: str) -> Iterator[tuple[str, ...]]:
        assert dataclasses.is_dataclass(value)
        assert not isinstance(value, type)
        docs = field_docs(type(value))
        for field in dataclasses.fields(value):
            child = vars_of(value, field.name)
            if dataclasses.is_dataclass(child):
                yield from walk(child, f"{prefix}{field.name}.")
            else:
                yield prefix + field.name, repr(child), docs[field.name]

    yield from walk(RunConfig(), "")


def vars_of(value: object, name: str) -> object:
    """The value of a slot."""
    return object.__getattribute__(value, name)


def field_docs(kind: type) -> dict[str, str]:
    """The string that follows each field in the class body."""
    body = ast.parse(inspect.getsource(kind)).body[0]
    assert isinstance(body, ast.ClassDef)
    docs: dict[str, str] = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            assert isinstance(field.target, ast.Name)
            docs[field.target.id] = str(text.value.value)
    return docs


TABLES: Final[Mapping[str, Rows]] = MappingProxyType(
    {
        "variants": Rows(
            title="variants: r_d multiplies and masks, r_s is clipped",
            columns=("variant", "r_d", "r_s", "total ratio", "proximal.source", "remark"),
            rows=variant_rows,
        ),
        "recipe": Rows(
            title="recipe keys; override any with --KEY VALUE",
            columns=("key", "default", "meaning"),
            rows=recipe_rows,
        ),
    }
)
"""What `show` can print."""
