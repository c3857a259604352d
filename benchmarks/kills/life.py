"""One start of a run, from its first process to its last: wait for a moment, strike, and see what comes of it.

The events that the run writes say what it does; a checkpoint is being written while its unfinished folder is there.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.kills.processes import Disk, born, end_all, family, left_over
from benchmarks.kills.starts import Start
from benchmarks.kills.trials import EVAL_EVERY, KINDS, Kind, Trial

HANG_S = 120.0
"""A run that says nothing new for so long hangs."""
HEARTBEAT_S = 5.0
"""`runtime.heartbeat_timeout_s` of the runs."""
POLL_S = 0.005


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a strike.

    Args:
        struck: Whether there was something to strike.
        status: The exit status; None: it goes on.
        wrong: What must never be.
        num_lost: Sampled tokens that a run which goes on says that it has lost since.
    """

    struck: bool
    status: int | None
    wrong: tuple[str, ...] = ()
    num_lost: int = 0


class Life:
    """A run from a start to its end, whichever it is."""

    def __init__(self, arguments: Sequence[str], run: Path, said: Path, environment: dict[str, str]) -> None:
        self._run, self._said = run, said
        self._events = run / "events.jsonl"
        self._offset = self._events.stat().st_size if self._events.exists() else 0
        self._known: list[str] = []
        self._sizes, self._news = list[int](), time.monotonic()
        said.write_bytes(b"")
        self.process = Start(["train", *arguments], said, environment)

    def strike(self, trial: Trial, disk: Disk) -> Outcome:
        """Wait for the moment, strike, and wait until the run has ended or is known to go on."""
        kind = KINDS[trial.kind]
        if not self._wait_for(trial) or not (victim := self._victim(kind, trial.pick)):
            if (status := self.process.poll()) is None:
                return Outcome(struck=False, status=None, wrong=(f"the moment did not come: {self.tail}",))
            wrong = () if status == 0 else (f"it ended by itself: {self.tail}",)
            return Outcome(struck=False, status=status, wrong=wrong)
        members = [(pid, born(pid)) for pid, _ in family(self.process.pid)]
        if kind.way == "disk":
            disk.fill(victim, self._events)
        else:
            os.kill(victim, signal.SIGKILL if kind.way == "kill" else signal.SIGSTOP)
        if kind.way == "freeze" and not kind.title:  # nobody watches the controller: it comes back
            time.sleep(HEARTBEAT_S + 2.0)
            os.kill(victim, signal.SIGCONT)
        return self._follow(kind, members, may_end=trial.moment == "resume")  # a server that is down at the start is an error

    def finish(self) -> Outcome:
        """Wait for the end."""
        status = self._wait_end()
        wrong = () if status == 0 else (f"it hangs: {self.tail}" if status is None else f"it did not end well: {self.tail}",)
        return Outcome(struck=False, status=status, wrong=wrong)

    @property
    def _hangs(self) -> bool:
        """Whether it has said nothing new, to anyone, for too long."""
        files = (self._events, self._said, *(self._run / "servers").glob("*.log"))
        now, sizes = time.monotonic(), [path.stat().st_size for path in files if path.exists()]
        if sizes != self._sizes:
            self._sizes, self._news = sizes, now
        return now - self._news > HANG_S

    def close(self) -> None:
        """Leave nothing behind."""
        end_all(self.process)

    @property
    def tail(self) -> str:
        """Its last words."""
        return " | ".join(self._said.read_text(errors="replace").splitlines()[-8:])

    def _follow(self, kind: Kind, members: Sequence[tuple[int, str | None]], *, may_end: bool) -> Outcome:
        before = len(self._lines())
        if kind.goes_on and self._goes_on():
            lost = [json.loads(line) for line in self._lines()[before:] if '"num_lost_tokens": ' in line]
            return Outcome(struck=True, status=None, num_lost=sum(event["num_lost_tokens"] for event in lost))
        if (status := self._wait_end()) is None:
            end_all(self.process, [pid for pid, birth in members if born(pid) == birth])
            return Outcome(struck=True, status=-9, wrong=(f"it hangs: {self.tail}",))
        wrong = [f"processes are left: {left}"] if (left := left_over(members)) else []
        wrong += self._faults(kind, status, may_end=may_end or not kind.goes_on)
        return Outcome(struck=True, status=status, wrong=tuple(wrong))

    def _goes_on(self) -> bool:
        """Whether it makes two updates more."""
        before = self._count("update")
        while self.process.poll() is None and not self._hangs:
            if self._count("update") >= before + 2:
                return True
            time.sleep(0.05)
        return False

    def _wait_end(self) -> int | None:
        """The exit status; None: it hangs."""
        while self.process.poll() is None and not self._hangs:
            time.sleep(0.05)
        return self.process.poll()

    def _faults(self, kind: Kind, status: int | None, *, may_end: bool) -> Iterator[str]:
        """What is wrong with how it ended."""
        if status == -signal.SIGKILL:
            return  # the command itself was killed: it cannot say anything
        text = self._said.read_text(errors="replace")
        if not may_end or not status:
            yield f"exit status {status}: {self.tail}"
        if "Traceback" in text:
            yield f"a traceback: {self.tail}"
        if status and not ("--resume" in text or "no checkpoint yet" in text):
            yield f"it does not say how to go on: {self.tail}"
        path = self._run / "summary.json"
        if kind.way == "disk" or not path.exists():  # a full disk may not have taken it
            return
        summary = json.loads(path.read_text())
        account = summary["accounting"]
        outcomes = sum(account[key] for key in ("trained", "filtered", "failed", "cancelled"))
        if account["submitted"] != outcomes or account["running"] or account["queued"]:
            yield f"the account does not balance: {account}"
        if summary["ended"] != ("done" if status == 0 else "error"):
            yield f"the summary says {summary['ended']!r}"

    def _victim(self, kind: Kind, pick: float) -> int | None:
        """The process to strike: it may still be coming."""
        while kind.title and self.process.poll() is None and not self._hangs:
            if found := [pid for pid, title in family(self.process.pid) if title.startswith(kind.title)]:
                return found[int(pick * len(found))]
            time.sleep(0.05)
        return self.process.pid if not kind.title and self.process.poll() is None else None

    def _wait_for(self, trial: Trial) -> bool:
        """Whether the moment came before the run ended."""
        num, partial = trial.skipped, set[str]()
        while self.process.poll() is None and not self._hangs:
            if trial.moment == "resume":
                break
            if trial.moment == "warm start":
                if b"supervised steps" in self._said.read_bytes():
                    break
            elif trial.moment == "checkpoint":
                partial |= {path.name for path in (self._run / "checkpoints").glob("v*.partial")}
                if len(partial) > num and self._has_checkpoint:
                    break
            elif self._has_checkpoint and self._occasions(trial.moment) > num:
                break
            time.sleep(POLL_S)
        else:
            return False
        time.sleep(trial.delay_s)
        return self.process.poll() is None

    @property
    def _has_checkpoint(self) -> bool:
        return any((self._run / "checkpoints").glob("v*[0-9]"))

    def _occasions(self, moment: str) -> int:
        """How often in this life the moment has come."""
        lines = self._lines()
        if not any('"kind": "run_started"' in line for line in lines):
            return 0
        if moment == "random":
            return len(lines)
        if moment == "publish":
            return sum('"kind": "published"' in line for line in lines) - 1  # the first one is that of the start
        return sum('"kind": "update"' in line and json.loads(line)["version"] % EVAL_EVERY == 0 for line in lines)

    def _count(self, kind: str) -> int:
        return sum(f'"kind": "{kind}"' in line for line in self._lines())

    def _lines(self) -> list[str]:
        """The whole lines of its events in this life."""
        if self._events.exists():
            with self._events.open("rb") as file:
                file.seek(self._offset)
                whole, newline, _ = file.read().rpartition(b"\n")
            self._offset += len(whole) + len(newline)
            self._known += whole.decode().split("\n") if newline else []
        return self._known
