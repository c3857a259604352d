"""What the tests of whole runs share: a small environment with dense rewards, a small recipe, and eyes on a run folder."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import tomli_w
import torch

from oldlogits.config.check import check
from oldlogits.config.load import config_from_table
from oldlogits.config.schema import RunConfig
from oldlogits.record.bus import Event
from oldlogits.record.event_log import read_events
from oldlogits.train.checkpoint import read_state

from .waiting import HUNG_S, wait_until


class Words:
    """Say low words; the reward is their share. It differs within every group, so every update moves the weights."""

    system_prompt = "w0 w1 w2"

    @staticmethod
    def make_row(split, index):
        return {"start": index % 20}

    def reset(self, start):
        self._said, self._turns = [], 0
        return f"w{start}"

    def reply(self, message):
        self._said += message.split()
        self._turns += 1
        return None if self._turns == 3 else "w3 w4"

    def look(self, word: str):
        """Look."""
        return word

    def get_reward(self):
        low = {f"w{i}" for i in range(10)}
        return sum(word in low for word in self._said) / max(len(self._said), 1)


TARGET = f"{__name__}:Words"


def recipe(folder: Path, **sections: object) -> RunConfig:
    """A run of four updates that takes a second or two; sections are merged into it."""
    table: dict[str, object] = {
        "num_updates": 4,
        "max_staleness": 2,
        "model": {"path": str(folder)},
        "env": {"target": TARGET, "max_episode_tokens": 96, "max_tokens_per_turn": 12, "max_turns": 4},
        "engine": {"max_num_seqs": 32},
        "rollout": {"group_size": 4, "prompts_per_update": 3},
        "trainer": {"lr": 1e-2, "warmup_steps": 0},
        "runtime": {"type": "lockstep"},
        "lockstep": {"max_lag": 2, "tokens_per_version": 6},
        "eval": {"num_episodes": 0},
    }
    for key, value in sections.items():
        table[key] = {**table.get(key, {}), **value} if isinstance(value, dict) else value
    config = config_from_table(table)
    check(config)
    return config


def write_recipe(path: Path, config: RunConfig) -> Path:
    path.write_text(tomli_w.dumps(asdict(config)))
    return path


def events_of(run: Path, kind: str | None = None) -> list[Event]:
    return [event for event in read_events(run / "events.jsonl") if kind in (None, event.kind)]


def tokens_of(run: Path, *names: str) -> dict[str, np.ndarray]:
    """Columns of all trained tokens of a run, over its updates."""
    paths = sorted((run / "tokens").glob("*.parquet"))
    import pyarrow.parquet as pq  # not where only `make gpu` runs

    tables = [pq.read_table(path, columns=list(names)) for path in paths]
    return {name: np.concatenate([t.column(name).to_numpy(zero_copy_only=False) for t in tables]) for name in names}


def summary_of(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


def check_accounting(run: Path) -> dict[str, int]:
    """The account of a run that has ended: nothing is outstanding and nothing is lost."""
    account = summary_of(run)["accounting"]
    assert account["queued"] == account["running"] == 0
    assert account["submitted"] == sum(account[key] for key in ("trained", "filtered", "failed", "cancelled"))
    return account


def assert_same_state(a: Path, b: Path) -> None:
    """Two states of checkpoints hold the same tensors, bit for bit."""
    left, right = read_state(a), read_state(b)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)


def children() -> list[str]:
    return [child.name for child in multiprocessing.active_children()]


def files_of(process: int | str) -> set[Path]:
    """The files with weights on their way that a process has."""
    folders = (Path("/dev/shm"), Path(tempfile.gettempdir()))
    return {path for folder in folders for path in folder.glob(f"oldlogits-{process}-*.weights")}


def num_updates_of(run: Path) -> int:
    """How many updates a run has made so far; it may not have begun."""
    return len(events_of(run, "update")) if (run / "events.jsonl").exists() else 0


def wait_for_updates(run: Path, num: int, *, hung_s: float = HUNG_S) -> None:
    """Return when the run has made `num` updates.

    Raises:
        TimeoutError: It does not make them.
    """
    wait_until(lambda: num_updates_of(run) >= num, f"{run} has made {num} updates", hung_s=hung_s)


class AfterUpdates(threading.Thread):
    """Does something in a thread when the run has made `num` updates. Whoever has run it calls `join` when it is over."""

    def __init__(self, run: Path, num: int, act: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self._run, self._num, self._act = run, num, act
        self._over = threading.Event()
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            wait_until(lambda: self._over.is_set() or num_updates_of(self._run) >= self._num, f"{self._num} updates")
            made = num_updates_of(self._run)
            assert made >= self._num, f"the run was over after {made} updates, before {self._num}"
            self._act()
        except BaseException as error:
            self._error = error
            if not self._over.is_set():
                os.kill(os.getpid(), signal.SIGINT)  # ends the run

    def join(self, timeout: float | None = None) -> None:
        """Wait for its end, the run being over.

        Raises:
            BaseException: What kept it from acting, or came of it.
        """
        self._over.set()
        super().join(timeout)
        if self._error is not None:
            raise self._error


def after_updates(run: Path, num: int, act: Callable[[], None]) -> AfterUpdates:
    """Do something in a thread when the run has made `num` updates."""
    thread = AfterUpdates(run, num, act)
    thread.start()
    return thread


def pid_of(name: str) -> int:
    """The process id of a child of this process."""
    [pid] = [child.pid for child in multiprocessing.active_children() if child.name == name]
    assert pid is not None
    return pid
