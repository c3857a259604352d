"""Every error that the source raises, read from its syntax trees: what is wrong, what is allowed, and what to do."""

from __future__ import annotations

import ast
import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "oldlogits"
TOPICS = {
    "Command line": ("cli", "compare", "bench"),
    "Recipes": ("config",),
    "Environments, agent programs and episodes": ("envs", "rollout"),
    "Models and tokenizers": ("models",),
    "Engines and servers": ("engines",),
    "Processes and clusters": ("backends", "rpc"),
    "Training": ("train", "loop", "run", "sources"),
    "Batches, trajectories and losses": ("batch", "objective", "core"),
    "Stored versions": ("versions",),
    "Run folders, replay and the doctor": ("record", "replay", "doctor"),
    "Inside other trainers": ("integrations",),
}
"""The folders of the source by topic; a folder that none names stands under the last heading, "Others"."""
OTHERS = "Others"
OPEN = "{...}"
"""What stands in a text for a value that only a run knows."""
MOST = 8
"""Alternatives that are followed where a text is chosen from several."""


@dataclass(frozen=True, kw_only=True)
class Text:
    """One error as the source writes it."""

    kind: str
    what: str
    allowed: str
    fix: str
    module: str

    @property
    def topic(self) -> str:
        """The heading that it stands under."""
        folder = self.module.partition("/")[0].removesuffix(".py")
        return next((topic for topic, folders in TOPICS.items() if folder in folders), OTHERS)


@dataclass(frozen=True)
class Module:
    """A module's tree, and the place of each node in it."""

    tree: ast.Module
    parents: dict[ast.AST, ast.AST] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for node in ast.walk(self.tree):
            self.parents.update(dict.fromkeys(ast.iter_child_nodes(node), node))

    def scopes(self, node: ast.AST) -> Iterator[ast.AST]:
        """The functions around a node, from the inner to the outer, and the module."""
        while node in self.parents:
            node = self.parents[node]
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Module):
                yield node

    def bound(self, name: ast.Name) -> list[ast.expr]:
        """What a name may stand for: the values assigned to it, or those that callers in this module give a parameter."""
        for scope in self.scopes(name):
            found = [value for node in ast.walk(scope) for value in _assigned(node, name.id)]
            if not found and isinstance(scope, ast.FunctionDef | ast.AsyncFunctionDef):
                found = self._given(scope, name.id)
            if found:
                return found[:MOST]
        return []

    def _given(self, function: ast.FunctionDef | ast.AsyncFunctionDef, name: str) -> list[ast.expr]:
        names = [one.arg for one in (*function.args.posonlyargs, *function.args.args)]
        keywords = [one.arg for one in function.args.kwonlyargs]
        if name not in (*names, *keywords):
            return []
        index = names.index(name) - (names[0] in ("self", "cls")) if name in names else -1
        calls = [node for node in ast.walk(self.tree) if isinstance(node, ast.Call) and _called(node) == function.name]
        by_place = [call.args[index] for call in calls if 0 <= index < len(call.args)]
        return by_place + [word.value for call in calls for word in call.keywords if word.arg == name]


def _assigned(node: ast.AST, name: str) -> list[ast.expr]:
    """The values that a statement or a walrus gives a name."""
    if isinstance(node, ast.NamedExpr) and node.target.id == name:
        return [node.value]
    if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
        return []
    found: list[ast.expr] = []
    for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
        if isinstance(target, ast.Name) and target.id == name:
            found.append(node.value)
        elif isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            pairs = zip(target.elts, node.value.elts, strict=False)
            found += [value for one, value in pairs if isinstance(one, ast.Name) and one.id == name]
    return found


def _called(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else call.func.attr if isinstance(call.func, ast.Attribute) else ""


def texts(module: Module, node: ast.expr, depth: int = 0) -> list[str]:
    """The texts that an expression may be, with what only a run knows left open."""
    if depth > MOST:
        return [OPEN]
    deeper = depth + 1
    if isinstance(node, ast.Constant):
        return [str(node.value)]
    if isinstance(node, ast.IfExp):
        return texts(module, node.body, deeper) + texts(module, node.orelse, deeper)
    if isinstance(node, ast.BoolOp):
        return [text for value in node.values for text in texts(module, value, deeper)]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _joined([texts(module, node.left, deeper), texts(module, node.right, deeper)])
    if isinstance(node, ast.JoinedStr):
        return _joined([texts(module, part, deeper) for part in node.values])
    if isinstance(node, ast.FormattedValue):
        followed = texts(module, node.value, deeper)
        return [_open(node.value)] if any(OPEN in text for text in followed) else followed
    if isinstance(node, ast.Name):
        found = [text for value in module.bound(node) for text in texts(module, value, deeper)]
        return found or [_open(node)]
    return [_open(node)]


def _open(node: ast.expr) -> str:
    """The name of a value that only a run knows: of `{config.variant}`, what is behind the last dot."""
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else "..."
    return f"{{{name.strip('_')}}}"


def _joined(parts: list[list[str]]) -> list[str]:
    return ["".join(chosen) for chosen in itertools.islice(itertools.product(*parts), MOST)]


def error_classes() -> dict[str, str]:
    """Name and docstring of every error class of the package, wherever it is defined."""
    found = {"OldLogitsError": ""}
    classes = [node for path in SOURCE.rglob("*.py") for node in ast.walk(_tree(path)) if isinstance(node, ast.ClassDef)]
    for _ in range(3):  # classes of classes
        for node in classes:
            if any(isinstance(base, ast.Name) and base.id in found for base in node.bases) or node.name == "OldLogitsError":
                found[node.name] = (ast.get_docstring(node) or "").partition("\n\n")[0].replace("\n", " ")
    return found


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def raised() -> tuple[Text, ...]:
    """Every error of the source, sorted by topic and text."""
    kinds, found = error_classes(), set()
    for path in sorted(SOURCE.rglob("*.py")):
        module = Module(_tree(path))
        for call in (node for node in ast.walk(module.tree) if isinstance(node, ast.Call)):
            arguments = list(call.args)
            kind = _called(call)
            if kind == "reading" and arguments:
                kind = ast.unparse(arguments.pop(0))
            if kind not in kinds or not arguments:
                continue
            given = {word.arg: word.value for word in call.keywords}
            allowed, fix = (
                " / ".join(dict.fromkeys(texts(module, given[key]))) if key in given else "" for key in ("allowed", "fix")
            )
            where = path.relative_to(SOURCE).as_posix()
            for what in texts(module, arguments[0]):
                if not what.startswith("{") or " " in what:  # not an error that is told on with the words of another
                    found.add(Text(kind=kind, what=what, allowed=allowed, fix=fix, module=where))
    topics = [*TOPICS, OTHERS]
    order = sorted(found, key=lambda one: (topics.index(one.topic), one.what.lower(), one.module, one.fix, one.allowed))
    return tuple(order)
