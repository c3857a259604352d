"""What is trained: a Qwen3 with random weights, and trajectories of several turns, as files that every contender reads.

This file imports nothing of the product, so that an interpreter without it reads the batch as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much one update trains.

    Args:
        groups: Groups of trajectories that share a prompt.
        members: Trajectories of each.
        shortest: Tokens of the shortest trajectory.
        longest: Tokens of the longest.
        vocabulary: Words of the model.
        width: Its hidden width.
        plain_tokens: The most padded tokens that the plain loop takes at once, where all logits of them are formed.
    """

    groups: int
    members: int
    shortest: int
    longest: int
    vocabulary: int
    width: int
    plain_tokens: int


_FULL: Final = Size(groups=8, members=8, shortest=200, longest=2000, vocabulary=151_936, width=128, plain_tokens=2048)
SIZES: Final = {
    "full": _FULL,
    "part": Size(groups=2, members=4, shortest=200, longest=2000, vocabulary=151_936, width=128, plain_tokens=2048),
    "smoke": Size(groups=2, members=2, shortest=40, longest=120, vocabulary=2048, width=32, plain_tokens=256),
}
"""full: what the goals are about. part: an eighth of it, of the same lengths. smoke: does it run?"""

PROMPT: Final = 0.6
"""The prompt of a group, as a share of the shortest trajectory."""
TURN, ANSWER = (20, 70), (60, 220)
"""The tokens that the agent samples in a turn, and those that come back: at least, and at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectories:
    """Trajectories side by side.

    Args:
        token_ids: int64 [token].
        is_sampled: bool [token].
        starts: int64 [trajectory + 1].
        advantages: float32 [trajectory].
    """

    token_ids: NDArray[np.int64]
    is_sampled: NDArray[np.bool_]
    starts: NDArray[np.int64]
    advantages: NDArray[np.float32]

    @property
    def pieces(self) -> list[tuple[NDArray[np.int64], NDArray[np.bool_]]]:
        """Each trajectory's tokens, and which of them were sampled."""
        cuts = self.starts[1:-1]
        return list(zip(np.split(self.token_ids, cuts), np.split(self.is_sampled, cuts), strict=True))

    @classmethod
    def drawn(cls, size: Size, seed: int = 0) -> Self:
        """Draw them: lengths are uniform, and turns of the agent and of what it talks to take turns to the end."""
        rng, ids, sampled, starts, advantages = np.random.default_rng(seed), [], [], [0], []
        for _ in range(size.groups):
            prompt = rng.integers(3, size.vocabulary, int(PROMPT * size.shortest))
            lengths = rng.integers(size.shortest, size.longest, size.members)
            lengths[rng.integers(size.members)] = size.longest
            for i, length in enumerate(lengths.tolist()):
                mask = np.zeros(length, np.bool_)
                at = len(prompt)
                while at < length:
                    turn = int(rng.integers(*TURN))
                    mask[at : at + turn] = True
                    at += turn + int(rng.integers(*ANSWER))
                ids.append(np.concatenate([prompt, rng.integers(3, size.vocabulary, length - len(prompt))]))
                sampled.append(mask)
                starts.append(starts[-1] + length)
                advantages.append((-1.0) ** i)
        return cls(
            token_ids=np.concatenate(ids),
            is_sampled=np.concatenate(sampled),
            starts=np.array(starts),
            advantages=np.array(advantages, np.float32),
        )

    def save(self, path: Path) -> None:
        """Write them to a file."""
        np.savez(path, **{name: getattr(self, name) for name in self.__dataclass_fields__})

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` has written."""
        with np.load(path) as file:
            return cls(**{name: file[name] for name in file.files})
