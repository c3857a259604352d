"""The licences of what a minimal install and each extra bring, read from the packages that are installed here.

    python tools/licences.py        # a table; status 1 where a licence is unknown or not allowed

What is allowed stands in ``licences.toml`` beside this file. A package that is not installed here has no licence to read: it is
named at the end.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

PROJECT = "oldlogits"
ALLOWED = Path(__file__).with_suffix(".toml")
MINIMAL, DEV = "minimal", "dev"
NO_LICENCE = {"DFSG approved", "OSI Approved"}
"""Classifiers that name no licence."""
ASIDE = re.compile(r"\s+WITH\s+[\w.-]+")


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What ``licences.toml`` says."""

    allowed: frozenset[str]
    names: Mapping[str, str]
    packages: Mapping[str, str]

    @classmethod
    def read(cls, path: Path = ALLOWED) -> Rules:
        """Read the file beside this one."""
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        return cls(allowed=frozenset(table["allowed"]), names=table["names"], packages=table["packages"])

    def permits(self, name: str, licence: str) -> bool:
        """Whether a package of this name may have this licence, an SPDX expression."""
        if any(fnmatch(name, pattern) for pattern in self.packages):
            return True
        return bool(licence) and self._holds(ASIDE.sub("", licence).strip())

    def _holds(self, expression: str) -> bool:
        """All of what AND joins, one of what OR joins; AND binds more tightly."""
        inner = re.search(r"\(([^()]*)\)", expression)
        if inner:
            known = next(iter(self.allowed)) if self._holds(inner[1]) else "no"
            return self._holds(expression[: inner.start()] + known + expression[inner.end() :])
        choices = re.split(r"\s+OR\s+", expression)
        return any(all(part.strip() in self.allowed for part in re.split(r"\s+AND\s+", choice)) for choice in choices)


def licence_of(metadata: Mapping[str, str], classifiers: list[str], rules: Rules) -> str:
    """The licence as an SPDX expression, or what stands there where it is none that is known; empty: nothing does."""
    expression = metadata.get("License-Expression")
    if expression:
        return expression
    named = [line.rpartition(" :: ")[2] for line in classifiers if line.startswith("License ::")]
    named = [name for name in named if name not in NO_LICENCE]
    if named:
        return " AND ".join(rules.names.get(name, name) for name in named)
    said = (metadata.get("License") or "").strip()
    first = said.splitlines()[0].strip() if said else ""
    return rules.names.get(first, first)


def asked_for(found: Distribution, extra: str) -> Iterator[Requirement]:
    """What a distribution requires here, with one of its extras or with none ("")."""
    for line in found.requires or ():
        one = Requirement(line)
        if one.marker is None or one.marker.evaluate({"extra": extra}):
            yield one


def closure(extra: str) -> tuple[dict[str, Distribution], set[str]]:
    """All distributions that an install with this extra brings, by name, and the names of those that are not here."""
    todo, seen = [(PROJECT, extra)], set()
    found: dict[str, Distribution] = {}
    missing = set()
    while todo:
        name, wanted = todo.pop()
        name = re.sub(r"[-_.]+", "-", name).lower()
        if (name, wanted) in seen:
            continue
        seen.add((name, wanted))
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            missing.add(name)
            continue
        for one in asked_for(found[name], wanted):
            todo += [(one.name, ""), *((one.name, each) for each in one.extras)]
    found.pop(PROJECT, None)
    return found, missing


def extras() -> list[str]:
    """The extras of the project."""
    return distribution(PROJECT).metadata.get_all("Provides-Extra") or []


def rows(rules: Rules) -> tuple[list[tuple[str, str, str, str, bool]], dict[str, set[str]]]:
    """Name, version, licence, what asks for it and whether it is allowed, of every package; and what is not here, by extra."""
    parts = {MINIMAL: closure(""), **{extra: closure(extra) for extra in sorted(extras(), key=lambda one: one == DEV)}}
    first: dict[str, str] = {}
    for part, (found, _) in parts.items():
        for name in found:
            first.setdefault(name, part)
    table = []
    for name, part in sorted(first.items()):
        one = parts[part][0][name]
        told = {key: one.metadata[key] for key in ("License-Expression", "License") if one.metadata[key]}
        licence = licence_of(told, one.metadata.get_all("Classifier") or [], rules)
        table.append((name, one.version, licence, part, rules.permits(name, licence)))
    return table, {part: missing for part, (_, missing) in parts.items() if missing}


def main() -> int:
    """Print the table; returns the exit status."""
    table, missing = rows(Rules.read())
    for name, version, licence, part, is_allowed in table:
        print(f"{'ok' if is_allowed else 'NO':<3} {name:<34} {version:<14} {part:<13} {licence or 'says nothing'}")
    for part, names in missing.items():
        print(f"not installed here, of {part}: {', '.join(sorted(names))}")
    wrong = [name for name, *_, is_allowed in table if not is_allowed]
    print(f"{len(table)} packages; with a licence that tools/licences.toml does not allow: {', '.join(wrong) or 'none'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
