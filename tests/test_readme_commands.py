"""Each command of README.md works as it is printed: the fast lane checks every one, the slow lane runs those that train."""

import re
import shlex
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from oldlogits.cli.main import VERBS, run

ROOT = Path(__file__).parents[1]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
SHORT = ("--num-updates", "1", "--eval.num-episodes", "8", "--rollout.prompts-per-update", "2")


def commands(page: str) -> Iterator[list[list[str]]]:
    """The commands of every block of shell, as lists of words; `a && b` are two, a line that ends in a backslash goes on."""
    for block in re.findall(r"^```(?:bash|sh|console)\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE):
        lines = block.replace("\\\n", " ").splitlines()
        parts = [part for line in lines for part in re.split(r"\s&&\s", line.removeprefix("$ "))]
        yield [words for part in parts if (words := shlex.split(part, comments=True))]


BLOCKS = list(commands((ROOT / "README.md").read_text(encoding="utf-8")))


def check(words: list[str], folder: Path, model: Path, *, trains: bool = False) -> Path:
    """Check a command that is typed in that folder, or run it briefly; returns the folder that the next one is typed in."""
    program, rest = Path(words[0]).name, [str(model) if word == "FOLDER" else word for word in words[1:]]
    if program == "cd":
        assert (folder / rest[0]).is_dir(), f"{words}: there is no such folder"
        return folder / rest[0]
    if program == "make":
        for target in rest:
            assert "=" in target or re.search(rf"^\.PHONY:.*\b{re.escape(target)}(\s|$)", MAKEFILE, re.MULTILINE), words
    elif program in ("pip", "uv"):
        for named in re.findall(r"oldlogits\[([\w,-]+)\]", " ".join(rest)):
            assert set(named.split(",")) <= set(EXTRAS), f"{words}: there is no such extra"
        assert "install" in rest, words
    elif program in ("oldlogits", "torchrun", "python", "python3"):
        if program != "oldlogits" and "oldlogits" not in rest:
            assert rest[:2] in (["-m", "venv"], ["-m", "pytest"]), f"{words}: not known to this test"
            return folder
        typed = rest if program == "oldlogits" else rest[rest.index("oldlogits") + 1 :]
        check_oldlogits(typed, trains=trains and program == "oldlogits" and not {"vllm", "ray"} & set(typed))
    else:
        assert words[:2] == [".", ".venv/bin/activate"] or program in ("git", "source"), f"{words}: not known to this test"
    return folder


def check_oldlogits(typed: list[str], *, trains: bool) -> None:
    """Run what follows `oldlogits`: a training dry or short, a project as it is, another verb's help."""
    if typed[:1] in (["train"], ["demo"]):
        assert run([*typed, *(SHORT if trains and "--dry-run" not in typed else ["--dry-run"])]) == 0, typed
    elif typed[:1] in ([], ["init"], ["show"], ["bounds"]):
        assert run(typed) == 0, typed
    else:
        assert typed[0] in (*VERBS, "--help", "--version"), typed
        with pytest.raises(SystemExit, match="0"):
            run([typed[0], "--help"])


def work_tree(at: Path) -> Path:
    """A folder with what a checkout has for a reader to type commands at."""
    for name in ("recipes", "examples"):
        shutil.copytree(ROOT / name, at / name)
    return at


def walk(blocks: list[list[list[str]]], at: Path, model: Path, monkeypatch: pytest.MonkeyPatch, *, trains: bool) -> None:
    for block in blocks:
        folder = at
        for words in block:
            monkeypatch.chdir(folder)
            folder = check(words, folder, model, trains=trains)


def test_every_command_of_the_readme_is_right(tmp_path, tiny_folder, monkeypatch):
    assert BLOCKS
    walk(BLOCKS, work_tree(tmp_path), tiny_folder, monkeypatch, trains=False)


@pytest.mark.slow
def test_every_training_of_the_readme_trains(tmp_path, tiny_folder, monkeypatch):
    walk(BLOCKS, work_tree(tmp_path), tiny_folder, monkeypatch, trains=True)


@pytest.mark.parametrize(
    "line",
    [
        "make dmeo",
        "cd examples/nowhere",
        "pip install 'oldlogits[nothing]'",
        "oldlogits train recipes/nowhere.toml",
        "oldlogits train desk --trainer.lrr 3",
        "oldlogits trian desk",
        "oldlogtis demo",
        "torchrun --nproc-per-node 2 -m oldlogits train nowhere",
    ],
)
def test_a_wrong_command_is_found(line, tmp_path, tiny_folder, monkeypatch):
    (blocks,) = [list(commands(f"```bash\n{line}  # a remark\n```\n"))]
    with pytest.raises((AssertionError, SystemExit)):
        walk(blocks, work_tree(tmp_path), tiny_folder, monkeypatch, trains=False)
