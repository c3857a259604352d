"""What several updates, or several files, have in common and should not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from oldlogits.doctor.tokens import Tokens
from oldlogits.doctor.verdicts import Verdict, cannot_tell, finding, healthy

_FEWEST: Final = 4
"""Trajectories that an update has in common with another one by more than chance."""

_IN_A_ROW: Final = 8
"""Different prompts whose order is the same by chance in one of 40,000 pairs of files."""

Hashes = NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class _Update:
    """The trajectories of one update, as hashes of tokens and engine's log-probs."""

    said: str
    hashes: Hashes
    tokens: Tokens


def trained_twice(files: Sequence[Tokens]) -> Verdict:
    """One batch, tokens and log-probs alike, in two updates or files."""
    updates = [update for tokens in files if tokens.has("token_id", "logp_mu") for update in _updates(tokens)]
    if not updates:
        return cannot_tell("no file has token ids and log-probs of mu")
    seen: dict[int, int] = {}
    for number, update in enumerate(updates):
        earlier = np.array([seen.get(int(one), -1) for one in update.hashes])
        if (earlier >= 0).sum() >= max(_FEWEST, 0.5 * len(earlier)):
            first = updates[int(np.bincount(earlier[earlier >= 0]).argmax())]
            says = (
                f"{(earlier >= 0).sum():,} of {len(earlier):,} trajectories of {update.said} are in {first.said} too: tokens "
                "and log-probs"
            )
            return finding(says, update.tokens, read=files, share=float((earlier >= 0).mean()))
        seen |= dict.fromkeys(map(int, update.hashes), number)
    return healthy(f"{len(updates)} updates have no batch in common", *files)


def same_order(files: Sequence[Tokens]) -> Verdict:
    """The same prompts in the same order in two files whose answers differ: a seed that does not reach the data."""
    orders = [(tokens, _prompts(tokens)) for tokens in files]
    known = [(tokens, prompts) for tokens, prompts in orders if len(np.unique(prompts)) >= _IN_A_ROW]
    if len(known) < 2:
        return cannot_tell("fewer than two files hold the prompts, as context tokens, of enough trajectories")
    for later, (tokens, prompts) in enumerate(known):
        for earlier, others in known[:later]:
            num = min(len(prompts), len(others))
            same = len(np.unique(prompts[:num])) >= _IN_A_ROW and bool((prompts[:num] == others[:num]).all())
            if same and _overlap(tokens, earlier):
                says = (
                    f"{tokens.batch.source} has the first {num:,} prompts of {earlier.batch.source} in the same order, and "
                    "other answers: the seed does not reach the order of the data"
                )
                return finding(says, tokens, read=files)
    return healthy(f"{len(known)} files have their prompts in different orders", *files)


def _overlap(one: Tokens, other: Tokens) -> bool:
    """Whether two files may be of the same updates of two runs, and are not of the same batch."""
    mine, theirs = np.unique(one.trainer_version), np.unique(other.trainer_version)
    may = bool(np.isin(mine, theirs).any()) or mine.max() < 0 or theirs.max() < 0
    return may and not np.isin(_hashes(one), _hashes(other)).all()


def _updates(tokens: Tokens) -> list[_Update]:
    hashes, first = _hashes(tokens), np.flatnonzero(tokens.begins)
    version = tokens.trainer_version[first]
    return [
        _Update(f"{tokens.batch.source} update {one}" if one >= 0 else tokens.batch.source, hashes[version == one], tokens)
        for one in np.unique(version)
    ]


def _hashes(tokens: Tokens) -> Hashes:
    """uint64 [trajectory]: of positions, token ids and the bits of mu."""
    first = np.flatnonzero(tokens.begins)
    begin = np.repeat(first, np.diff(np.append(first, len(tokens))))
    words = tokens.token_id.astype(np.uint64) << np.uint64(32) | tokens.mu.view(np.uint32).astype(np.uint64)
    return _sum(words, np.arange(len(tokens)) - begin, first)


def _prompts(tokens: Tokens) -> Hashes:
    """uint64 [trajectory with context before its first loss token]: of that context, in order."""
    table = tokens.batch.table
    if "token_id" in tokens.batch.lacks or not len(tokens):
        return np.zeros(0, np.uint64)
    first_loss = np.full(len(table.trajectories), np.iinfo(np.int32).max, np.int32)
    first = np.flatnonzero(tokens.begins)
    first_loss[tokens.trajectory[first]] = tokens.index[first]
    rows = np.flatnonzero(table.index < first_loss[table.trajectory])
    if not len(rows):
        return np.zeros(0, np.uint64)
    starts = np.flatnonzero(np.diff(table.trajectory[rows], prepend=-1) != 0)
    return _sum(table.token_id[rows].astype(np.uint64), table.index[rows], starts)


def _sum(words: Hashes, places: NDArray[np.integer], starts: NDArray[np.integer]) -> Hashes:
    """Hash sequences of words that stand side by side, each from its start."""
    with np.errstate(over="ignore"):
        mixed = (words ^ (words >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed += places.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.add.reduceat(mixed ^ (mixed >> np.uint64(31)), starts) if len(starts) else np.zeros(0, np.uint64)
