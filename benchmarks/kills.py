"""Kill -9 of every kind of process of a run at random times: does each run go on or end clearly, and train nothing twice?

python -m benchmarks.kills [--times 20] [--seed 0] [--kinds trainer engine ...] [--out FOLDER]

Each trial trains a small desk agent, kills one process of one kind at a random time after the first update, and waits. What
goes on must come to its end; what ends must say what happened and how to go on, and is then resumed from its last
checkpoint, if it has one, to its end. In both cases no process of it may be left, the account must balance, and no token may
have been trained twice. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from oldlogits.record.event_log import read_events, typed
from oldlogits.record.events import Updated
from oldlogits.rpc.processes import PREFIX

NUM_UPDATES = 40  # so many that none is over before its kill, at most 6 s after the first
HANG_S = 300.0  # a run that takes longer hangs
GONE_S = 20.0  # how long its processes may take to go after it
RECIPE = Path(__file__).parents[1] / "recipes" / "desk.toml"
SMALL = [
    *("--num-updates", str(NUM_UPDATES), "--eval.num-episodes", "0", "--eval.every", "0", "--record.checkpoint-every", "3"),
    *("--rollout.prompts-per-update", "4", "--rollout.group-size", "4", "--engine.max-num-seqs", "16"),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A kind of process.

    Args:
        flags: With which a run has one.
        title: How its name begins where the system lists it; empty: the command itself.
        goes_on: Whether the run outlives it.
    """

    flags: Sequence[str]
    title: str
    goes_on: bool


SERVERS = ["--engine.type", "vllm", "--engine.server", "embedded", "--engine.num-servers", "2"]
RAY = ["--runtime.type", "ray"]
KINDS = {
    "controller": Kind(flags=[], title="", goes_on=False),
    "engine": Kind(flags=[], title=f"{PREFIX}engin", goes_on=False),
    "trainer": Kind(flags=[], title=f"{PREFIX}train", goes_on=False),
    "dedicated": Kind(flags=["--proximal.source", "dedicated"], title=f"{PREFIX}score", goes_on=False),
    "server": Kind(flags=SERVERS, title=f"{PREFIX}serve", goes_on=True),
    "engine of a server": Kind(flags=SERVERS, title=f"{PREFIX}engin", goes_on=True),
    "worker of a cluster": Kind(flags=RAY, title="ray::Worker", goes_on=True),
    "server of a worker": Kind(flags=RAY, title=f"{PREFIX}serve", goes_on=True),
    "trainer of a cluster": Kind(flags=RAY, title="ray::Calls", goes_on=False),
}


def main() -> int:
    """Run the trials, one line each; 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--out", type=Path, default=None, help="keep the run folders here")
    options = parser.parse_args()
    rng, failures = random.Random(options.seed), 0
    with tempfile.TemporaryDirectory() as temporary:
        for trial in range(options.times):
            name = options.kinds[trial % len(options.kinds)]
            folder = (options.out or Path(temporary)) / f"{trial:02d}-{name.replace(' ', '-')}"
            started = time.monotonic()
            found = attempt(KINDS[name], folder, delay_s=rng.uniform(0.0, 6.0), rng=rng)
            failures += not found.is_good
            verdict = "ok    " if found.is_good else "FAILED"
            print(
                f"{trial + 1:2d}/{options.times} {verdict} {name}: {found.text} ({time.monotonic() - started:.0f} s)",
                flush=True,
            )
    print(f"{options.times - failures} of {options.times} runs went on or ended clearly, and trained no token twice")
    return 1 if failures else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What came of a trial."""

    is_good: bool
    text: str


def attempt(kind: Kind, folder: Path, *, delay_s: float, rng: random.Random) -> Found:
    """Train, kill, and look; resume what ended."""
    run = folder / "run"
    folder.mkdir(parents=True)
    train = [sys.executable, "-m", "oldlogits", "train"]
    with (folder / "said.txt").open("w+") as said:
        process = subprocess.Popen(
            [*train, str(RECIPE), "--out", str(run), *SMALL, *kind.flags], stdout=said, stderr=said, start_new_session=True
        )
        try:
            if not wait_for_update(process, run):
                return Found(is_good=False, text=f"it did not begin: {tail(folder)}")
            time.sleep(delay_s)
            victims = (
                [pid for pid, title in family(process.pid) if title.startswith(kind.title)] if kind.title else [process.pid]
            )
            if process.poll() is not None or not victims:
                return Found(is_good=False, text=f"nothing to kill after {delay_s:.1f} s: {tail(folder)}")
            before, members = updates_of(run), [pid for pid, _ in family(process.pid)]
            os.kill(rng.choice(victims), signal.SIGKILL)
            killed_at = time.monotonic()
            status = process.wait(HANG_S)
        except subprocess.TimeoutExpired:
            return Found(is_good=False, text=f"it hangs: {tail(folder)}")
        finally:
            kill_group(process)
    ended_s = time.monotonic() - killed_at
    wrong = list(judge(kind, run, folder, status, members))
    may_resume = any(run.glob("checkpoints/v*[0-9]"))
    if status != 0 and may_resume and not wrong:
        again = subprocess.run([*train, "--resume", str(run)], capture_output=True, text=True, timeout=HANG_S)
        if again.returncode != 0:
            wrong.append(f"it cannot be resumed: {again.stderr[-300:]}")
    wrong += check_tokens(run, num_updates=NUM_UPDATES if status == 0 or may_resume else updates_of(run))
    ended = f"it ended after {ended_s:.1f} s"
    how = "it went on" if status == 0 else f"{ended} and was resumed" if may_resume else f"{ended}, before a checkpoint"
    return Found(is_good=not wrong, text="; ".join(wrong) or f"killed {delay_s:.1f} s on, in update {before + 1}; {how}")


def judge(kind: Kind, run: Path, folder: Path, status: int, members: Sequence[int]) -> Iterator[str]:
    """What is wrong with how it went on or ended."""
    ends = time.monotonic() + GONE_S
    while (left := [pid for pid in members if is_alive(pid)]) and time.monotonic() < ends:
        time.sleep(0.1)
    if left:
        yield f"processes are left: {left}"
    if status == -signal.SIGKILL:
        return  # the command itself was killed: it cannot say anything
    if kind.goes_on != (status == 0):
        yield f"exit status {status}: {tail(folder)}"
    text = (folder / "said.txt").read_text()
    if "Traceback" in text:
        yield f"a traceback: {tail(folder)}"
    if status != 0 and not ("ended" in text and ("--resume" in text or "no checkpoint yet" in text)):
        yield f"it does not say what ended and how to go on: {tail(folder)}"
    summary = json.loads((run / "summary.json").read_text())
    account = summary["accounting"]
    outcomes = sum(account[key] for key in ("trained", "filtered", "failed", "cancelled"))
    if account["submitted"] != outcomes or account["running"] or account["queued"]:
        yield f"the account does not balance: {account}"
    if summary["ended"] != ("done" if status == 0 else "error"):
        yield f"the summary says {summary['ended']!r}"


def check_tokens(run: Path, *, num_updates: int) -> list[str]:
    """Whether every token of every update was trained once, by a version that may train it."""
    paths = sorted((run / "tokens").glob("*.parquet"))
    names = ["trajectory", "index", "staleness", "provenance"]
    seen: set[tuple[str, int]] = set()
    wrong = [] if len(paths) == num_updates else [f"{len(paths)} of {num_updates} updates are there"]
    for path in paths:
        columns = pq.read_table(path, columns=names).to_pydict()
        tokens = set(zip(columns["trajectory"], columns["index"], strict=True))
        if len(tokens) != len(columns["index"]) or tokens & seen:
            wrong.append(f"{path.name} trains tokens twice")
        if set(columns["provenance"]) != {"exact"}:
            wrong.append(f"{path.name} has old logits that are not exact")
        seen |= tokens
    return wrong


def wait_for_update(process: subprocess.Popen[bytes], run: Path) -> bool:
    """Whether it made an update before it ended."""
    ends = time.monotonic() + HANG_S
    while process.poll() is None and time.monotonic() < ends:
        if updates_of(run):
            return True
        time.sleep(0.05)
    return False


def updates_of(run: Path) -> int:
    """Updates so far."""
    path = run / "events.jsonl"
    return len(typed(read_events(path), Updated)) if path.exists() else 0


def family(root: int) -> list[tuple[int, str]]:
    """The process ids and names of all descendants of a process."""
    parents, titles = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            before, _, after = path.read_text().rpartition(")")
        except OSError:
            continue
        pid = int(path.parent.name)
        titles[pid], parents[pid] = before.partition("(")[2], int(after.split()[1])
    found, frontier = [], {root}
    while frontier := {pid for pid, parent in parents.items() if parent in frontier}:
        found += [(pid, titles[pid]) for pid in sorted(frontier)]
    return found


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Leave nothing of a run behind, however it went."""
    for pid in [pid for pid, _ in family(process.pid)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    if process.poll() is None:
        process.kill()
        process.wait()


def tail(folder: Path) -> str:
    """Its last words."""
    return " | ".join((folder / "said.txt").read_text().splitlines()[-6:])


if __name__ == "__main__":
    sys.exit(main())
