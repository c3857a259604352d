"""Environments of runs that are killed and go on."""

import asyncio
import hashlib
import os
import random

from ..runs import Words


class Failing(Words):
    """Fails in one of five episodes, in its second turn, whatever was said: a replay may fare better."""

    def reply(self, message):
        answer = super().reply(message)
        if self._turns == 2 and hashlib.sha256(message.encode()).digest()[0] < 50:
            raise RuntimeError("the shop is closed")
        return answer


class Closing(Words):
    """Fails at its end in one of five episodes, whatever was said."""

    def get_reward(self):
        if random.random() < 0.2:
            raise RuntimeError("the shop is closed")
        return super().get_reward()


class Saving(Words):
    """Is saved and restored; it counts in what nobody can replay: the number of the process."""

    def reply(self, message):
        answer = super().reply(message)
        return None if answer is None else f"{answer} w{os.getpid() % 7 + 5}"

    def save_state(self):
        return {"said": self._said, "turns": self._turns}

    def load_state(self, state):
        self._said, self._turns = state["said"], state["turns"]


class Otherwise(Words):
    """Answers otherwise in every process."""

    def reply(self, message):
        answer = super().reply(message)
        return None if answer is None else f"{answer} w{os.getpid() % 7 + 5}"


class Slow(Words):
    """Takes a moment to answer, asynchronously."""

    async def reply(self, message):
        await asyncio.sleep(0.002)
        return super().reply(message)
