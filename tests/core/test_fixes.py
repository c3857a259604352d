"""What errors tell a reader to type exists: verbs, flags, extras and recipe keys."""

import ast
import re
import tomllib
from pathlib import Path

from oldlogits.cli.main import VERBS
from oldlogits.config.load import known_keys

ROOT = Path(__file__).parents[2]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
SECTIONS = {key.partition(".")[0] for key in known_keys() if "." in key}


def constants(node: ast.AST) -> str:
    """The text of a literal; a value that is filled in is a brace."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(constants(part) or "{}" for part in node.values)
    return ""


def fixes() -> list[tuple[str, str]]:
    """Where an error says what to do, and its words: whatever is passed as `fix`."""
    found = []
    for path in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "fix":
                said = [constants(part) for part in ast.walk(node.value)]
                found += [(f"{path.relative_to(ROOT)}:{node.value.lineno}", text) for text in said if text]
    return found


def wrong(text: str) -> list[str]:
    """The verbs, flags, extras and keys in it that do not exist."""
    bad = [verb for verb in re.findall(r"(?<!of )\boldlogits ([a-z]+)\b", text) if verb not in VERBS]
    bad += [extra for names in re.findall(r"oldlogits\[([\w,]+)\]", text) for extra in names.split(",") if extra not in EXTRAS]
    keys = re.findall(rf"(?<![\w./])(?:--)?((?:{'|'.join(sorted(SECTIONS))})\.[a-z_-]+)\b(?![./(])", text)
    bad += [key for key in keys if key.replace("-", "_") not in known_keys() and not key.endswith((".json", ".toml", ".py"))]
    return bad


def test_what_every_fix_names_exists():
    assert len(fixes()) > 100
    assert {where: bad for where, text in fixes() if (bad := wrong(text))} == {}


def test_what_does_not_exist_is_found():
    assert wrong("oldlogits tarin desk") == ["tarin"]
    assert wrong("pip install 'oldlogits[nothing]'") == ["nothing"]
    assert wrong("set trainer.lrr = 3, or --rollout.group-size 4") == ["trainer.lrr"]
