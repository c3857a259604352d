"""What carries out the calls of a trainer in its process."""

from __future__ import annotations

from collections.abc import Callable

from oldlogits.rpc.client import Dispatcher
from oldlogits.train.calls import TrainerCalls
from oldlogits.train.trainer import Trainer


class TrainerService(Dispatcher):
    """Carries out `TrainerCalls` by a trainer and its scorer, and counts the seconds by `clock`."""

    def __init__(self, trainer: Trainer, clock: Callable[[], float]) -> None:
        super().__init__(TrainerCalls, trainer, trainer.scorer)
        self._trainer, self._clock = trainer, clock

    def call(self, method: str, arguments: tuple[object, ...]) -> object:
        """Carry out a call."""
        started = self._clock()
        try:
            return super().call(method, arguments)
        finally:
            self._trainer.busy_s += self._clock() - started
