"""Renew the locks (constraints*.txt), or check that an environment is what its lock says.

    python tools/lock.py renew              # all locks; prints the versions that changed
    python tools/lock.py check LOCK         # this interpreter's environment

A lock names every package that may be needed, on all systems, at an exact version. It is given to pip as constraints, so that
pip installs of it only what it needs: with a CPU wheel of torch, none of the packages for CUDA.
"""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

PROJECT = Path("pyproject.toml")
ENVS = ("--extra", "serve", "--extra", "vllm", "--extra", "mcp", "--extra", "smollm2", str(PROJECT))
"""This package and those of its extras that are tested beside the packages of other projects."""
PEERS = ("--extra", "lora", "--extra", "ray", str(PROJECT))
"""The same for the trainers that there are adapters for."""
LOCKS = {
    Path("constraints.txt"): (PROJECT, "--all-extras", "--constraint", "constraints.in"),
    # vLLM asks for a build of torch, torch==2.13.0+cpu, that not every index has.
    Path("constraints-vllm.txt"): (Path("constraints-vllm.in"), "--python-version", "3.11", "--override", "constraints.in"),
    Path("constraints-envs.txt"): (
        Path("constraints-envs.in"),
        "--python-version",
        "3.11",
        *ENVS,
        "--constraint",
        "constraints.in",
    ),
    Path("constraints-peers.txt"): (
        Path("constraints-peers.in"),
        "--python-version",
        "3.11",
        *PEERS,
        "--constraint",
        "constraints.in",
    ),
}
"""The arguments of `uv pip compile` by lock."""
HEADER = "# Every package at an exact version. `make lock` writes this file; constraints*.in say what is pinned on purpose.\n"
UNLOCKED = {"oldlogits", "pip"}
"""Packages that no lock names."""


def read_lock(path: Path) -> dict[str, set[str]]:
    """Return the versions of each package: several where it depends on the Python or the system."""
    versions: dict[str, set[str]] = {}
    for line in path.read_text().splitlines():
        if "==" in line and not line.startswith("#"):
            name, version = line.partition(";")[0].strip().split("==")
            versions.setdefault(normalise(name), set()).add(version)
    return versions


def normalise(name: str) -> str:
    """Return a package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def renew() -> None:
    """Resolve anew and print what changed."""
    for lock, (source, *arguments) in LOCKS.items():
        before = read_lock(lock)
        command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--universal", "--upgrade", "--no-header"]
        command += ["--no-annotate", *arguments, str(source)]
        lock.write_text(HEADER + subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        after = read_lock(lock)
        print(f"{lock}: {len(after)} packages")
        for name in sorted(before.keys() | after.keys()):
            old, new = (", ".join(sorted(found.get(name, {"none"}))) for found in (before, after))
            if old != new:
                print(f"  {name}: {old} -> {new}")


def check(lock: Path) -> str | None:
    """Return what this environment has that the lock does not name, or None."""
    locked = read_lock(lock)
    found = {normalise(d.metadata["Name"]): d.version.partition("+")[0] for d in distributions()}
    wrong = [f"{n}=={v}" for n, v in sorted(found.items()) if n not in UNLOCKED and v not in locked.get(n, ())]
    if not wrong:
        return None
    return f"{sys.prefix} has what {lock} does not name: {' '.join(wrong)}\nStart afresh with `make clean install`."


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["renew"]:
            renew()
        case ["check", path]:
            sys.exit(check(Path(path)))
        case _:
            sys.exit(__doc__)
