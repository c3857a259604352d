"""Pages that are written from the source whenever the site is built: recipe, command line, names, errors."""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import re
import tomllib
from collections.abc import Iterator, Mapping

from oldlogits.cli.main import FAILED, INTERRUPTED, REFUSED, VERBS, WRONG, usage
from oldlogits.cli.main import run as run_verb
from oldlogits.cli.show import TABLES, _sections, recipe_rows
from oldlogits.config.objective.presets import PRESETS
from oldlogits.core import errors, policies
from tools.site.error_texts import SOURCE, error_classes, raised

WIDTH = "100"
"""Columns that a verb's help is wrapped to."""
OTHER_NAMES = SOURCE / "config" / "other_names.toml"
BENCH = ("bench", "versions")
"""The one verb with verbs of its own."""


def cell(text: str) -> str:
    """A text as one cell of a table: what Markdown would take for markup stands there as it is, outside of `code`."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    escapes = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "&#124;", "*": "&#42;", "_": "&#95;", "[": "&#91;"}
    whole = [part if part.startswith("`") else "".join(escapes.get(one, one) for one in part) for part in parts]
    return "".join(part.replace("|", "&#124;") if not part.startswith("`") else part.replace("|", "/") for part in whole)


def table(columns: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    """Rows as a Markdown table."""
    lines = [columns, ("---",) * len(columns), *(tuple(cell(one) or "-" for one in row) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def names_elsewhere() -> Mapping[str, list[str]]:
    """What other projects call each key; a table by project, once there is one, is read here."""
    found: dict[str, list[str]] = {}
    for theirs, key in tomllib.loads(OTHER_NAMES.read_text(encoding="utf-8"))["elsewhere"].items():
        found.setdefault(key, []).append(f"`{theirs}`")
    return found


def elsewhere() -> str:
    """The table of docs/glossary.md: what other projects call keys of a recipe, and which of their objectives are presets."""
    found = {key: list(names) for key, names in names_elsewhere().items()}
    projects = sorted({name.partition(":")[0] for name in PRESETS})
    found["objective.preset"] = [*found.get("objective.preset", []), *(f"`{project}:...`" for project in projects)]
    return table(("key", "what others call it"), ((f"`{key}`", ", ".join(sorted(found[key]))) for key in sorted(found)))


def recipe() -> str:
    """Every recipe key under its section."""
    elsewhere = names_elsewhere()
    parts = [
        "# Recipe\n\nEvery key with its default, what it may be, what it means, and what TRL, verl, prime-rl, AReaL, slime or "
        "vLLM call it. `oldlogits show recipe` prints the same. On the command line a key is overridden by its dotted name.\n"
    ]
    rows = list(recipe_rows())
    for section, kind in _sections():
        own = [row for row in rows if row[0].rpartition(".")[0] == section]
        columns = ("key", "default", "allowed", "meaning", "elsewhere")
        lines = (
            (f"`{key}`", f"`{default}`", allowed, meaning, ", ".join(elsewhere.get(key, ())))
            for key, default, allowed, meaning in own
        )
        parts.append(f"## {f'[{section}]' if section else 'Top level'}\n\n{inspect.getdoc(kind)}\n\n{table(columns, lines)}")
    return "\n".join(parts)


def help_of(*words: str) -> str:
    """What a verb prints for --help."""
    said, before = io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = WIDTH
    try:
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            run_verb([*words, "--help"])
    finally:
        os.environ.pop("COLUMNS") if before is None else os.environ.update(COLUMNS=before)
    return said.getvalue().strip()


def command_line() -> str:
    """Every verb with its help."""
    status = f"0 for done, {FAILED} for what failed or was found, {REFUSED} for what is refused, {INTERRUPTED} after Ctrl-C"
    parts = [f"# Command line\n\n```text\n{usage()}\n```\n\nExit status: {status}.\n"]
    for verb, what in VERBS.items():
        words = [(verb,), BENCH] if verb == BENCH[0] else [(verb,)]
        shown = "\n".join(f"```text\n{help_of(*one)}\n```\n" for one in words)
        parts.append(f"## oldlogits {verb}\n\n{what[0].upper()}{what[1:]}.\n\n{shown}")
    return "\n".join(parts)


def remarks(kind: type) -> dict[str, str]:
    """The remark behind each member of an enumeration, by its name."""
    body = inspect.getsource(kind)
    return dict(re.findall(r'^    (\w+) = "\w+"(?:  # (.+))?$', body, flags=re.MULTILINE))


def names() -> str:
    """Policies, provenances, and the tables that `oldlogits show` prints."""
    parts = ["# Names\n\nWhat a recipe, a metric or a token table may name; `oldlogits show` prints these tables.\n"]
    for kind in (policies.Policy, policies.Provenance):
        rows = ((f"`{name}`", text) for name, text in remarks(kind).items())
        parts.append(f"## {kind.__name__}\n\n{inspect.getdoc(kind)}\n\n{table(('name', 'meaning'), rows)}")
    for name, shown in TABLES.items():
        if name != "recipe":
            parts.append(f"## {name.capitalize()}\n\n{cell(shown.title)}.\n\n{table(shown.columns, shown.rows())}")
    return "\n".join(parts)


def error_texts() -> str:
    """Every error of the source with what to do."""
    wrong = {kind.__name__ for kind in WRONG}
    classes = error_classes()

    def status(name: str) -> str:
        kind = getattr(errors, name, None)
        return str(REFUSED if kind and issubclass(kind, WRONG) else FAILED)

    rows = ((f"`{name}`", said, status(name)) for name, said in classes.items())
    assert wrong <= classes.keys()
    parts = [
        "# Errors\n\nAn error says what is wrong, what it got, what is allowed, and how to fix it. Below, `{name}` stands for "
        "what only a run knows. Where there is no error and something looks wrong: *Troubleshooting*.\n",
        f"## Kinds\n\nThe last column is the exit status of a command.\n\n{table(('class', 'meaning', 'exit'), rows)}",
    ]
    texts = raised()
    for topic in dict.fromkeys(text.topic for text in texts):
        lines = ((one.what, one.allowed, one.fix, f"`{one.kind}`") for one in texts if one.topic == topic)
        parts.append(f"## {topic}\n\n{table(('error', 'allowed', 'fix', 'class'), lines)}")
    return "\n".join(parts)


PAGES = {"recipe": recipe, "command-line": command_line, "names": names, "errors": error_texts}
"""The written pages by file name."""
