"""The house rules of docs/architecture.md that a program can check: sizes, and docstrings that a stranger understands."""

import ast
import re
import statistics
from pathlib import Path

import pytest

import oldlogits
from oldlogits.cli.main import VERBS

ROOT = Path(oldlogits.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
LINES = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}

MAX_LINES, MAX_MEDIAN, MAX_FILE, MAX_FUNCTION, MAX_FOLDER = 54_000, 130, 350, 60, 15
FRAGMENT = re.compile(r"(Of|That|Whose|Which|Where|Likewise|And|As)\b(?! (is|are|may|must)\b)")


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """The lines of a function without its decorators and its docstring."""
    first = function.body[0]
    is_documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    docstring = first.end_lineno - first.lineno + 1 if is_documented else 0
    return function.end_lineno - function.lineno + 1 - docstring


def functions(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def arguments(docstring: str) -> list[tuple[str, str]]:
    """Name and description of every entry of a docstring's section "Args:"."""
    section = re.search(r"^\s*Args:\n((?:\s*\n|\s{4,}.*\n?)+)", docstring, flags=re.MULTILINE)
    if section is None:
        return []
    indent = re.match(r" *", section.group(1)).group(0)
    return re.findall(rf"^{indent}(\*{{0,2}}\w+): (.+)$", section.group(1), flags=re.MULTILINE)


def test_the_wheel_stays_small():
    assert sum(LINES.values()) <= MAX_LINES
    assert statistics.median(LINES.values()) <= MAX_MEDIAN


def test_no_file_has_two_jobs():
    assert {named(path): lines for path, lines in LINES.items() if lines > MAX_FILE} == {}


def test_no_function_is_longer_than_a_screen():
    long = {
        f"{named(path)}:{function.name}": code_lines(function)
        for path, tree in TREES.items()
        for function in functions(tree)
        if code_lines(function) > MAX_FUNCTION
    }
    assert long == {}


def test_no_folder_is_a_pile():
    folders = {path.parent for path in FILES}
    of_verbs = {ROOT / f"cli/{verb}.py" for verb in VERBS}  # one file a verb
    piles = {named(folder): len({*folder.glob("*.py")} - of_verbs) for folder in folders}
    assert {folder: count for folder, count in piles.items() if count > MAX_FOLDER + 1} == {}  # and its __init__.py


@pytest.mark.parametrize("path", FILES, ids=named)
def test_descriptions_of_arguments_are_understood_without_the_type_beside_them(path):
    nodes = [node for node in ast.walk(TREES[path]) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]
    described = [entry for node in nodes for entry in arguments((ast.get_docstring(node) or "") + "\n")]
    assert [f"{name}: {text}" for name, text in described if FRAGMENT.match(text)] == []


def test_the_reader_of_docstrings_reads_them():
    found = arguments(
        "One line.\n\nArgs:\n    a: The first.\n    *b: Of the rest,\n        on two lines.\n\nRaises:\n    X: Never.\n"
    )
    assert found == [("a", "The first."), ("*b", "Of the rest,")]
    assert FRAGMENT.match("Of the rest,")
    assert not FRAGMENT.match("Offset of the first.")
