"""``oldlogits show variants | objectives | presets | sources | recipe | RUN``: print a table, or the summary of a run."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Final, get_type_hints

import tyro
from rich.console import Console, Group, RenderableType
from rich.text import Text

from oldlogits.cli.table import INDENT, Rows, wrapped
from oldlogits.config.objective.presets import PRESETS
from oldlogits.config.reader import allowed_values, as_written, fields_by_key
from oldlogits.config.schema import RunConfig
from oldlogits.core.errors import ConfigError
from oldlogits.core.objective.cards import CARDS
from oldlogits.core.policies import EXPERIMENTAL_VARIANTS, VARIANTS
from oldlogits.core.source import SOURCES, provided, sources_for


@dataclass(frozen=True, slots=True, kw_only=True)
class ShowOptions:
    """Print the variants, the losses, other projects' objectives, the sources, every recipe key, or the summary of a run."""

    what: Annotated[str, tyro.conf.Positional]
    """variants | objectives | presets | sources | recipe | a run folder."""
    markdown: bool = False
    """Print tables as Markdown: what README.md and docs/ hold."""


def command(arguments: Sequence[str]) -> int:
    """Print what was asked for."""
    options = tyro.cli(ShowOptions, prog="oldlogits show", args=list(arguments))
    console = Console(highlight=False)
    if options.what in TABLES:
        table = TABLES[options.what]
        shown = table.markdown() if options.markdown else table.rich(console.width)
        console.print(shown, markup=False, soft_wrap=options.markdown)
    elif (folder := Path(options.what)).is_dir():
        from oldlogits.record.folder import unreadable_run
        from oldlogits.record.live.conclusion import print_summary
        from oldlogits.record.summary import Summary

        if not (folder / "summary.json").is_file():
            raise ConfigError(
                "this folder has no summary", got=str(folder), allowed="a run folder", fix="let the run end first"
            )
        with unreadable_run(folder):
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
class Shown:
    """A table: columns and rows, shown in the terminal or as Markdown.

    Args:
        title: What stands above it in the terminal.
        columns: The names of the columns.
        rows: Makes the rows, one cell a column.
        body: Makes what the terminal shows of them for its width; by default columns, or blocks of lines where it is narrow.
    """

    title: str
    columns: tuple[str, ...]
    rows: Callable[[], Iterator[tuple[str, ...]]]
    body: Callable[[int], RenderableType] | None = None

    def rich(self, width: int) -> RenderableType:
        """What the terminal shows."""
        title = Text("\n".join(wrapped(self.title, width)) + "\n", style="italic")
        return Group(title, self.body(width) if self.body else Rows(self.columns, list(self.rows())))

    def markdown(self) -> str:
        """What a document holds."""
        lines = [self.columns, ("---",) * len(self.columns), *self.rows()]
        return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def variant_rows() -> Iterator[tuple[str, ...]]:
    """Name, r_d, r_s, total ratio, sources, remark of every variant."""
    for name, variant in {**VARIANTS, **EXPERIMENTAL_VARIANTS}.items():
        remarks = [] if variant.corrects_mismatch else ["mismatch uncorrected"]
        remarks += ["experimental"] if name in EXPERIMENTAL_VARIANTS else []
        ratios = (str(variant.r_d), str(variant.r_s), str(variant.total))
        yield name, *ratios, ", ".join(sources_for(name)) or "-", ", ".join(remarks)


def objective_rows() -> Iterator[tuple[str, ...]]:
    """Name, what it does, paper, the paper's row, keys, and whether the audit understands it, of every loss."""
    for name, card in CARDS.items():
        own = dataclasses.fields(card.options) if card.options else ()
        keys = [f"objective.{bound}" for bound in card.bounds]
        keys += [f"options.{field.name} = {_in_a_recipe(field.default)}" for field in own]
        audited = "yes" if card.has_active_set and not card.step_rule else "no"
        yield name, card.what, card.paper, card.variant, ", ".join(keys) or "-", audited


def preset_rows() -> Iterator[tuple[str, ...]]:
    """Name, what it is called there, its keys, and what they leave out, of every preset."""
    for name, preset in PRESETS.items():
        keys = [f"{key} = {_in_a_recipe(value)}" for key, value in preset.keys.items()]
        yield name, preset.source, ", ".join(keys), preset.leaves_out


def _in_a_recipe(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_in_a_recipe(inner)}" for key, inner in value.items()) + "}"
    return f'"{value}"' if isinstance(value, str) else as_written(value)


def source_rows() -> Iterator[tuple[str, ...]]:
    """Name, what it provides, what it costs of every source."""
    for name in SOURCES.names:
        source = SOURCES.find(name)
        yield name, ", ".join(sorted(policy.name for policy in provided(source))) or "-", source.cost


def recipe_rows() -> Iterator[tuple[str, ...]]:
    """Dotted key, default, allowed values and meaning of every recipe key."""
    default, sections = RunConfig(), dict(_sections())
    for key, hint in fields_by_key(RunConfig).items():
        section, _, name = key.rpartition(".")
        yield key, as_written(attrgetter(key)(default)), allowed_values(hint), field_docs(sections[section])[name]


def recipe_body(width: int) -> Group:
    """The keys under their sections: key and default, what it may be, what it means."""
    lines, sections, last = [], dict(_sections()), ""
    for key, default, allowed, meaning in recipe_rows():
        section = key.rpartition(".")[0]
        if section != last:
            heading = wrapped(f"[{section}] {inspect.getdoc(sections[section])}", width, later=INDENT)
            lines += [Text(), Text("\n".join(heading), style="bold blue")]
            last = section
        later = [*wrapped(f"allowed: {allowed}", width, indent=INDENT), *wrapped(meaning, width, indent=INDENT)]
        first = wrapped(f"{key} = {default}", width, later=INDENT)
        lines += [Text("\n".join(first), style="bold"), Text("\n".join(later))]
    return Group(*lines)


def _sections() -> Iterator[tuple[str, type]]:
    """The dataclass of each section of a recipe; that of the top level has no name."""
    yield "", RunConfig
    for name, hint in get_type_hints(RunConfig).items():
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            yield name, hint


def field_docs(kind: type) -> dict[str, str]:
    """The string that follows each field in the class body, on one line."""
    body = ast.parse(inspect.getsource(kind)).body[0]
    assert isinstance(body, ast.ClassDef)
    docs: dict[str, str] = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            assert isinstance(field.target, ast.Name)
            docs[field.target.id] = " ".join(str(text.value.value).split())
    return docs


TABLES: Final[Mapping[str, Shown]] = MappingProxyType(
    {
        "variants": Shown(
            title="variants: r_d multiplies and masks, r_s is clipped",
            columns=("variant", "r_d", "r_s", "total ratio", "proximal.source", "remark"),
            rows=variant_rows,
        ),
        "objectives": Shown(
            title="losses of objective.loss; each works with every variant, and the paper's own row is named",
            columns=("objective.loss", "what it does", "paper (arXiv)", "its row", "keys that it reads", "audit"),
            rows=objective_rows,
        ),
        "presets": Shown(
            title="other projects' objectives: objective.preset, and the keys that each stands for",
            columns=("objective.preset", "called there", "keys", "left out"),
            rows=preset_rows,
        ),
        "sources": Shown(
            title="sources of the proximal policy's log-probs; auto takes the first that provides what the variant needs",
            columns=("proximal.source", "provides", "costs"),
            rows=source_rows,
        ),
        "recipe": Shown(
            title="recipe keys with their defaults, allowed values and meanings; override any with --KEY VALUE",
            columns=("key", "default", "allowed", "meaning"),
            rows=recipe_rows,
            body=recipe_body,
        ),
    }
)
"""What `show` can print."""
