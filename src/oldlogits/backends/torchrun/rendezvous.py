"""The board: what the ranks of a launch tell each other outside of their exchanges. It lies in torchrun's own store.

begin         the first rank is about to meet the others
call/7        the seventh call of the trainer is due: meet for it
beat/2        rank 2 is alive: a number that rises
end           the run is over
"""

from __future__ import annotations

import atexit
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import Final

import torch.distributed as dist

from oldlogits.backends.torchrun.launch import Launch
from oldlogits.core.errors import WorkerDiedError

BEAT_S: Final = 0.5
"""Seconds between heartbeats."""
SILENT_S: Final = 5.0
"""A rank without a heartbeat for so many seconds, after an exchange has failed, is named as lost."""
GONE_S: Final = 120.0
"""Followers give up when the first rank has given no heartbeat for so many seconds; a busy machine delays them."""


class Rendezvous:
    """One rank's access to the board; `WorkerDiedError` says that torchrun's store does not answer."""

    def __init__(self, launch: Launch) -> None:
        self._launch, self._patience_s = launch, GONE_S
        self.store = self._connect()

    def begin(self) -> None:
        """The first rank: meet the others."""
        self.store.set("begin", "")

    def announce(self, number: int) -> None:
        """The first rank: a call is due."""
        self.store.set(f"call/{number}", "")
        self.store.delete_key(f"call/{number - 2}")  # nobody waits for it any more

    def end(self) -> None:
        """The first rank: the run is over, however it ended."""
        with suppress(RuntimeError):  # torchrun is gone: nobody waits for it
            self.store.set("end", "")

    def await_begin(self) -> bool:
        """Wait until the ranks are to meet; False: the run is over."""
        while not self._waited("begin"):
            if self.has_ended:
                return False
        return True

    def await_call(self, number: int) -> bool:
        """Wait until a call is due; False: the run is over. A silent first rank is a `WorkerDiedError`."""
        beat, since = -1, time.monotonic()
        while not self._waited(f"call/{number}"):
            if self.has_ended:
                return False
            found = self._beat(0)
            if found != beat:
                beat, since = found, time.monotonic()
            elif time.monotonic() - since > self._patience_s:
                raise WorkerDiedError(
                    "rank 0 ended, or no longer answers",
                    got=f"no sign of life for {self._patience_s:g} seconds",
                    allowed="a first rank that lives until the end of the run",
                    fix="look at its output; go on with --resume from the last checkpoint",
                )
        return True

    def hurry(self) -> None:
        """Something is wrong, or the run is to end: wait for a silent first rank no longer than `SILENT_S` seconds."""
        self._patience_s = SILENT_S

    @property
    def has_ended(self) -> bool:
        """Whether the run is over; it is where torchrun is gone."""
        try:
            ended: bool = self.store.check(["end"])
        except RuntimeError:
            return True
        return ended

    def beat(self) -> None:
        """Give heartbeats from here on, as long as this process lives."""
        done = threading.Event()
        beating = threading.Thread(target=self._keep_beating, args=(done,), name="beat", daemon=True)
        beating.start()

        def end() -> None:  # a thread that comes back from the store when the interpreter is gone aborts the process
            done.set()
            beating.join(SILENT_S)

        atexit.register(end)

    def silent(self) -> list[int]:
        """The other ranks that give no heartbeat; takes up to `SILENT_S` seconds. None where torchrun is gone."""
        others = [rank for rank in range(self._launch.num_ranks) if rank != self._launch.rank]
        ends = time.monotonic() + SILENT_S
        try:
            before = {rank: self._beat(rank) for rank in others}
            while others and time.monotonic() < ends:
                time.sleep(BEAT_S)
                others = [rank for rank in others if self._beat(rank) == before[rank]]
        except RuntimeError:
            return []
        return others

    def _keep_beating(self, done: threading.Event) -> None:
        store, number = self._connect(), 0  # of its own: the other one may be waiting
        while not done.wait(BEAT_S if number else 0):
            number += 1
            try:
                store.set(f"beat/{self._launch.rank}", str(number))
            except RuntimeError:  # torchrun is gone, and with it everybody who would look
                return

    def _beat(self, rank: int) -> int:
        key = f"beat/{rank}"
        return int(self.store.get(key)) if self.store.check([key]) else 0

    def _waited(self, key: str) -> bool:
        """Whether a key is there, within a second or so; looks often at first, since calls follow one another."""
        pause_s, ends = 0.0005, time.monotonic() + 1
        while not (found := bool(self.store.check([key]))) and time.monotonic() < ends:
            time.sleep(pause_s)
            pause_s = min(0.02, 1.5 * pause_s)
        return found

    def _connect(self) -> dist.PrefixStore:  # type: ignore[name-defined]
        launch = self._launch
        try:
            store = dist.TCPStore(launch.host, launch.port, is_master=False, timeout=timedelta(seconds=60))  # type: ignore[attr-defined]
        except RuntimeError as error:
            raise WorkerDiedError(
                "torchrun's store does not answer",
                got=f"{launch.host}:{launch.port}: {str(error).splitlines()[0]}",
                allowed="a store of torchrun's that every rank reaches",
                fix="start the run with torchrun --nproc-per-node N -m oldlogits train ...",
            ) from error
        return dist.PrefixStore(f"oldlogits/{launch.attempt}", store)  # type: ignore[attr-defined]
