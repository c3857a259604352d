"""What the site is built from: the project's Markdown at its own places, whatever it links to, and the written pages."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from tools.site.error_texts import ROOT
from tools.site.pages import PAGES

HOME, CONTENTS, WRITTEN = Path("README.md"), Path("docs/README.md"), Path("reference")
BEGIN = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "docs/**/*.md", "examples/**/README.md")
"""The pages that links are followed from."""
STYLE = Path("tools/site/site.css")
LINK = re.compile(r"(?<!!)\]\((?![a-z]+:)([^)#\s]+)(#[^)]*)?\)")
FENCE = re.compile(r"^(\s*)(```+|~~~+)(\w*).*$")
BLOCK = re.compile(r"^(\s*)([-*+]|\d+\.) |^\|")
"""The first line of a list or of a table."""


def linked(page: Path) -> Iterator[Path]:
    """The files and folders of the project that a page links to."""
    for target, _ in LINK.findall((ROOT / page).read_text(encoding="utf-8")):
        yield (ROOT / page.parent / target).resolve().relative_to(ROOT)


def gather() -> list[Path]:
    """Every page and file of the site, in the order in which it is found."""
    todo = [path.relative_to(ROOT) for pattern in BEGIN for path in sorted(ROOT.glob(pattern))]
    found: dict[Path, None] = {}
    while todo:
        path = todo.pop(0)
        if path in found or not (ROOT / path).exists():
            continue  # a link that leads nowhere stays, and fails the build
        if (ROOT / path).is_dir():
            todo.append(path / "README.md")
            continue
        found[path] = None
        todo += linked(path) if path.suffix == ".md" else ()
    return list(found)


def as_the_builder_reads_it(text: str, page: Path) -> str:
    """Markdown as forges read it, in the stricter form of the builder: a blank line before lists and tables, bare fences."""
    lines: list[str] = []
    fence = ""
    for line in text.splitlines():
        match = FENCE.match(line)
        if match and (not fence or match[2] == fence):
            fence = "" if fence else match[2]
            line = match[1] + match[2] + match[3]
        elif not fence:
            before = lines[-1] if lines else ""
            if BLOCK.match(line) and before.strip() and not BLOCK.match(before) and not before.startswith(" "):
                lines.append("")
            line = LINK.sub(lambda link: _to_a_page(link, page), line)
        lines.append(line)
    return "\n".join(lines) + "\n"


def _to_a_page(link: re.Match[str], page: Path) -> str:
    """A link to a folder leads to its page; one to a folder without a page is left out."""
    folder = ROOT / page.parent / link[1]
    if not folder.is_dir():
        return link[0]
    readme = f"{link[1].rstrip('/')}/README.md"
    return f"]({readme}{link[2] or ''})" if (folder / "README.md").is_file() else "]"


def stage(folder: Path) -> list[Path]:
    """Write all of it into a new folder; returns the pages."""
    shutil.rmtree(folder, ignore_errors=True)
    pages = []
    for path in gather():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".md":
            text = as_the_builder_reads_it((ROOT / path).read_text(encoding="utf-8"), path)
            (folder / path).write_text(text, encoding="utf-8")
            pages.append(path)
        else:
            shutil.copy(ROOT / path, folder / path)
    for name, written in PAGES.items():
        path = WRITTEN / f"{name}.md"
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(written(), encoding="utf-8")
        pages.append(path)
    (folder / STYLE).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / STYLE, folder / STYLE)
    return pages


def navigation(pages: list[Path]) -> list[object]:
    """The sections of docs/README.md with the pages that they link to; then the written pages, then all others."""
    sections: dict[str, list[str]] = {}
    placed, title = {HOME, CONTENTS}, "Documents"
    for line in (ROOT / CONTENTS).read_text(encoding="utf-8").splitlines():
        heading = re.match(r"(?:#+ |\*\*)(.+?)(?:\*\*)?$", line)
        title = heading[1].strip() if heading else title
        for target, _ in LINK.findall(line):
            path = (ROOT / CONTENTS.parent / target).resolve().relative_to(ROOT)
            path = path / "README.md" if path / "README.md" in pages else path
            if path in pages and path not in placed:
                sections.setdefault(title, []).append(path.as_posix())
                placed.add(path)
    sections["Reference"] = [path.as_posix() for path in pages if path.parent == WRITTEN]
    sections["More"] = [path.as_posix() for path in pages if path not in placed and path.parent != WRITTEN]
    listed: list[object] = [HOME.as_posix(), CONTENTS.as_posix()]
    return listed + [{name: found} for name, found in sections.items() if found]


def slug(text: str, separator: str) -> str:
    """The anchor that forges give a heading."""
    return re.sub(r"\s", separator, re.sub(r"[^\w\s-]", "", text.strip().lower()))
