"""The command line: ``oldlogits VERB ...``. One file per verb; a verb's module is imported only when it is called."""

from __future__ import annotations

import errno
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Final

from oldlogits import __version__
from oldlogits.cli.table import wrapped
from oldlogits.core.errors import (
    ConfigError,
    EnvironmentShapeError,
    ModelFolderError,
    OldLogitsError,
    ReplayError,
    RunFolderError,
    TokenTableError,
    printable,
)

VERBS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "demo": "train the order desk's agent: a few minutes, no GPU, no download",
        "init": "write a small project of your own that trains at once",
        "train": "train an agent from a recipe",
        "fetch": "fetch a small real model, where no model hub can be reached",
        "eval": "evaluate a checkpoint on the held-out rows of a recipe",
        "compare": "run recipes under the same seeds, and show gains and costs",
        "watch": "show a run and those beside it in a browser, live",
        "report": "write report.html of a run folder again",
        "doctor": "say what is wrong with the tokens of a training batch",
        "replay": "train again from recorded batches, under the same or another recipe",
        "bounds": "print what band, clip and interpolation mean for the total ratio",
        "bench": "measure what exact versions cost on this machine",
        "play": "act as the agent of an environment, or watch a checkpoint",
        "serve": "serve a model over chat interfaces and vLLM's HTTP routes",
        "workers": "change how many rollout workers a run on a cluster has",
        "show": "print variants, losses, presets, sources, recipe keys, or a run",
    }
)
"""Each verb is the function ``command(arguments) -> exit status`` of ``oldlogits.cli.VERB``; demo is that of train."""

WRONG: Final = (ConfigError, EnvironmentShapeError, ModelFolderError, ReplayError, RunFolderError, TokenTableError)
"""Errors that are the command's or the recipe's."""
REFUSED: Final = 2
"""Exit status of a command that was wrong."""
FAILED: Final = 1
"""Exit status of a command that was right and failed."""
INTERRUPTED: Final = 130
"""Exit status after Ctrl-C."""


BEGIN: Final = f"""oldlogits {__version__}: asynchronous RL of LLM agents that never loses the old logits

  oldlogits demo            watch a small agent learn: minutes on two cores, no GPU, no download
  oldlogits init my-agent   begin a project of your own
  oldlogits --help          all commands"""
"""What `oldlogits` alone prints: what to type next."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a verb and exit with its status; errors of this package are printed without a traceback."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    sys.exit(run(words))


def run(words: list[str]) -> int:
    """Run a verb; returns the exit status."""
    if sys.platform == "win32":
        print("oldlogits runs on Linux and macOS; on Windows, use it in WSL 2", file=sys.stderr)
        return REFUSED
    if not words:
        print(BEGIN)
        return 0
    if words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if words[0] in ("-V", "--version"):
        print(f"oldlogits {__version__}")
        return 0
    return attempt(_verb, words)


def attempt(command: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int:
    """Run a command; returns its exit status, or that of an error of this package, which is printed without a traceback."""
    try:
        return command(arguments)
    except OldLogitsError as error:
        print_error(error)
        return REFUSED if isinstance(error, WRONG) else FAILED
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        allowed, fix = "the lengths that the file system takes, 255 bytes a name on most", "name another path"
        print_error(ConfigError("a path is too long", got=str(error.filename)[:100], allowed=allowed, fix=fix))
        return REFUSED
    except KeyboardInterrupt:
        return INTERRUPTED


def _verb(words: Sequence[str]) -> int:
    """Import the verb that the first word names, and run it with the others."""
    if words[0] not in VERBS:
        raise ConfigError("unknown command", got=words[0], allowed=", ".join(VERBS), fix="run `oldlogits --help`")
    if words[0] == "demo":
        demo: int = importlib.import_module("oldlogits.cli.train").command(["desk", *words[1:]], prog="oldlogits demo")
        return demo
    status: int = importlib.import_module(f"oldlogits.cli.{words[0]}").command(words[1:])
    return status


def print_error(error: OldLogitsError) -> None:
    """What, got, allowed and fix, a line each, on standard error; a terminal gets lines that end between words."""
    parts = {"error": error.what, "got": error.got, "allowed": error.allowed, "fix": error.fix}
    for label, text in parts.items():
        if text:
            line = f"{label:>8}: {printable(text)}"
            print("\n".join(wrapped(line, later=" " * 10)) if sys.stderr.isatty() else line, file=sys.stderr)


def usage() -> str:
    """The verbs, and where to begin."""
    verbs = "\n".join(f"  {verb:<8}{text}" for verb, text in VERBS.items())
    return (
        f"oldlogits {__version__}: asynchronous RL of LLM agents that never loses the old logits\n\n"
        f"usage: oldlogits VERB ...\n\n{verbs}\n\n"
        "begin with:  oldlogits demo\n"
        "your own:    oldlogits init my-agent\n"
        "help:        oldlogits VERB --help"
    )
