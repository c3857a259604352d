"""A run and the trials on it: each life of the run is struck, and the next one goes on; the last one is played to its end.

life 1 --strike--> snapshot --resume--> life 2 --strike--> snapshot --resume--> ... --resume--> the end: what is missing?
"""

from __future__ import annotations

import json
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.kills.ledger import Loss, Snapshot, faults_of_tables, loss_of_all, losses, snapshot_of, tables_of
from benchmarks.kills.life import HEARTBEAT_S, Life
from benchmarks.kills.processes import Disk
from benchmarks.kills.results import Result
from benchmarks.kills.trials import CHECKPOINT_EVERY, EVAL_EVERY, KINDS, NOT_RESTORED, NUM_SLOTS, SETUPS, Plan, Trial
from oldlogits.cli.main import INTERRUPTED
from oldlogits.loop.resume import LoopState
from oldlogits.record.folder import RunFolder
from oldlogits.rollout.journal.journal import FILE as IN_FLIGHT

RECIPE = Path(__file__).parents[2] / "recipes" / "desk.toml"
ENDLESS = 1000
"""Updates of a run that is still to be struck."""
DRAIN = 6
"""Updates after the last one that is known: the window of the staleness bound is five, so that all in flight is trained."""
SMALL = [
    *("--eval.every", str(EVAL_EVERY), "--eval.num-episodes", "8", "--eval.num-episodes-during", "8"),
    *("--eval.num-calibration", "0", "--rollout.prompts-per-update", "4", "--rollout.group-size", "4"),
    *("--rollout.max-running-groups", "8", "--engine.max-num-seqs", str(NUM_SLOTS), "--env.latency-s", "0.02"),
    *("--record.checkpoint-every", str(CHECKPOINT_EVERY), "--trainer.min-lr-ratio", "1"),
    *("--trainer.minibatches-per-update", "1", "--runtime.heartbeat-timeout-s", f"{HEARTBEAT_S:g}"),
]
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}


class Chain:
    """One run.

    Args:
        number: Its number in the plan.
        plan: What is done to it.
        folder: Where it lies.
        keeps_failed: Whether the folder stays when a trial has failed.
    """

    def __init__(self, number: int, plan: Plan, folder: Path, *, keeps_failed: bool) -> None:
        self._number, self._plan, self._folder, self._keeps_failed = number, plan, folder, keeps_failed
        self._disk = Disk(folder / "disk")
        self._is_closed = False
        self._num_runs, self._num_lives = 0, 0
        self._life: Life | None = None
        self._snapshots: list[Snapshot | None] = []
        self._results: list[Result] = []

    def play(self) -> list[Result]:
        """Carry out all trials; returns their results in order."""
        self._disk.open(is_small=any(KINDS[trial.kind].way == "disk" for trial in self._plan.trials))
        try:
            for trial in self._plan.trials:
                self._strike(trial)
            self._conclude()
        finally:
            self.close()
        return self._results

    def close(self) -> None:
        """Leave nothing running, and the folder only if it is to stay."""
        self._is_closed = True
        if self._life is not None:
            self._life.close()
        keeps = self._keeps_failed and any(result.wrong for result in self._results)
        self._disk.close(self._folder / "kept" if keeps else None)
        if not keeps:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _strike(self, trial: Trial) -> None:
        started = time.monotonic()
        if self._life is not None and trial.moment == "resume":  # it has gone on, so that there is none
            trial = replace(trial, moment="random")
        cold = {"OLDLOGITS_CACHE": str(self._folder / "cold")} if trial.moment == "warm start" else {}
        life = self._life = self._life or self._begin(ENDLESS, cold)
        outcome = life.strike(trial, self._disk)
        wrong = list(outcome.wrong)
        if outcome.struck and outcome.status is None:
            came = "went on"
            self._snapshots.append(None)
        else:
            self._end_life()
            checkpoint = RunFolder(path=self._run).latest_checkpoint()
            came = "missed" if not outcome.struck else "resumed" if checkpoint else "began again"
            self._snapshots.append(self._snapshot() if checkpoint else None)
            if cold and any((self._folder / "cold").glob("tiny-*")):
                wrong.append("a model that is not whole is in the cache")
        loss = loss_of_all(self._run) if came == "began again" else Loss()
        if came == "went on":
            num_sampled = sum(len(tokens) for tables in tables_of(self._run).values() for tokens in tables.values())
            loss = Loss(num_half_turns=outcome.num_lost, num_sampled=num_sampled)
        seconds_s = time.monotonic() - started
        self._results.append(
            Result(run=self._number, trial=trial, came=came, wrong=tuple(wrong), seconds_s=seconds_s, loss=loss)
        )

    def _begin(self, num_updates: int, environment: dict[str, str]) -> Life:
        """Start the run, or let it go on from its checkpoint."""
        if self._is_closed:
            raise InterruptedError("the trials are over")
        self._num_lives += 1
        said = self._folder / f"said-{self._num_lives}.txt"
        can_resume = RunFolder(path=self._run).latest_checkpoint() is not None
        if not can_resume and self._run.exists():
            self._num_runs += 1
        begin = ["--resume", str(self._run)] if can_resume else [str(RECIPE), *SMALL, *SETUPS[self._plan.setup]]
        begin += [] if can_resume else ["--out", str(self._run)]
        return Life([*begin, "--num-updates", str(num_updates)], self._run, said, ENVIRONMENT | environment)

    def _end_life(self) -> None:
        assert self._life is not None, "it began"
        self._life.close()
        self._life = None
        self._disk.empty()

    def _conclude(self) -> None:
        """Play the run to its end, and say what is missing there."""
        if self._life is not None:
            self._interrupt(self._life)
            self._end_life()
        num_updates = DRAIN + max([0, *RunFolder(path=self._run).all_checkpoints(), *tables_of(self._run)])
        self._life = self._begin(num_updates, {})
        wrong = list(self._life.finish().wrong)
        self._end_life()
        if not wrong:
            wrong += faults_of_tables(self._run, num_updates) + self._faults_of_account()
            end = self._snapshot()
            in_flight = {id: episode.tokens for id, episode in end.episodes.items()}
            struck = [one for one in self._snapshots if one]
            restarted = {id for one in (*struck, end) for id in one.restarted} if self._plan.setup in NOT_RESTORED else set()
            found = iter(losses(struck, end.trained, in_flight, NUM_SLOTS, restarted))
            self._results = [
                self._with_loss(result, next(found)) if snapshot else result
                for result, snapshot in zip(self._results, self._snapshots, strict=True)
            ]
        last = self._results[-1]
        self._results[-1] = replace(last, wrong=(*last.wrong, *wrong))

    def _interrupt(self, life: Life) -> None:
        life.process.send_signal(signal.SIGINT)
        if (status := life.finish().status) != INTERRUPTED:
            last = self._results[-1]
            self._results[-1] = replace(last, wrong=(*last.wrong, f"interrupted, it ended with {status}: {life.tail}"))

    def _with_loss(self, result: Result, loss: Loss) -> Result:
        return replace(result, loss=loss, wrong=result.wrong + loss.wrong)

    def _snapshot(self) -> Snapshot:
        checkpoint = RunFolder(path=self._run).latest_checkpoint()
        assert checkpoint is not None, "it was looked for"
        return snapshot_of(self._run, checkpoint, LoopState.read(checkpoint).journal, IN_FLIGHT)

    def _faults_of_account(self) -> list[str]:
        """Whether the account balances at the end, and counts as trained what the tables hold."""
        account = json.loads((self._run / "summary.json").read_text())["accounting"]
        ended = sum(account[key] for key in ("trained", "filtered", "failed", "cancelled", "queued", "running"))
        num_trained = sum(map(len, tables_of(self._run).values()))
        is_right = account["submitted"] == ended and account["trained"] == num_trained
        return [] if is_right else [f"the account of the end is {account}, and {num_trained} trajectories were trained"]

    @property
    def _run(self) -> Path:
        return self._folder / "disk" / f"run-{self._num_runs}"
