"""An environment whose episodes are long and cheap to sample, and whose rewards differ: every value of the weights moves."""

from __future__ import annotations

import zlib


class Reading:
    """Read a long text and say something; any two answers have rewards of their own."""

    system_prompt = "w0 w1 w2"

    @staticmethod
    def make_row(split, index):
        return {"start": index % 20}

    def reset(self, start):
        self._said = ""
        return " ".join(f"w{(start + i) % 20}" for i in range(70))

    def reply(self, message):
        self._said = message

    def look(self, word: str):
        """Look."""
        return word

    def get_reward(self):
        return zlib.crc32(self._said.encode()) / 2**32
