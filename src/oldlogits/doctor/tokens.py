"""What a diagnosis looks at: the loss tokens of a batch as columns, with a lag, a segment and a stand-in's mark for each."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray

from oldlogits.batch.token_table import TokenTable

Ints = NDArray[np.int32]
Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]

UNKNOWN: Final = np.iinfo(np.int32).min
"""The lag of a token one of whose two versions was not recorded."""

IN_DOUBT: Final = -0.01
"""Log-prob of mu below which a token was not certain: only there do policies have to differ."""

MOST_SAMPLED: Final = 1_000_000
"""Loss tokens that statistical checks read: whole trajectories, chosen evenly; exact checks read all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the user says about the training: where it is not said, what is usual is assumed, and said to be.

    Args:
        eps_low: The clip's lower half-width.
        eps_high: Its upper one.
        dual_clip: The largest ratio of tokens with a negative advantage.
        band: The band on r_d.
        denominator: What the loss divides by, as objective.loss_aggregation calls it; "": not said.
        stated: Whether clip and band were said.
    """

    eps_low: float = 0.2
    eps_high: float = 0.28
    dual_clip: float = 3.0
    band: float = 1.5
    denominator: str = ""
    stated: bool = False

    @property
    def assumed(self) -> str:
        """The bounds in words."""
        bounds = f"clip [{1 - self.eps_low:g}, {1 + self.eps_high:g}], band {self.band:g}"
        return bounds if self.stated else f"{bounds} (assumed; say yours with --eps-low, --eps-high, --band)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The tokens of one file or folder.

    Args:
        source: What the user calls it.
        framework: Who has written it, as remedies name it; "" where nobody knows.
        table: Its tokens.
        lacks: Columns that the table has to have and the dump does not: their values mean nothing.
        notes: What the reader has to say about how it read.
        contradictions: What the dump says of versions that cannot be.
        settings: What the dump says of the training; None: nothing.
    """

    source: str
    framework: str
    table: TokenTable
    lacks: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()
    contradictions: tuple[str, ...] = ()
    settings: Settings | None = None


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Loss tokens, those of a trajectory side by side. Columns are ``[token]``; a column that is absent is all NaN or -1.

    Args:
        batch: What they are of.
        settings: What is known of the training.
        rows: int64; the row of each in the batch's table.
    """

    batch: Batch
    settings: Settings
    rows: NDArray[np.int64]

    @classmethod
    def of(cls, batch: Batch, settings: Settings) -> Tokens:
        """Take all loss tokens of a batch."""
        return cls(batch=batch, settings=settings, rows=np.flatnonzero(batch.table.mask))

    @cached_property
    def sample(self) -> Tokens:
        """About `MOST_SAMPLED` of them, as whole trajectories that are evenly spread over the batch."""
        if len(self) <= MOST_SAMPLED:
            return self
        numbers = np.cumsum(np.diff(self.trajectory, prepend=self.trajectory[:1]) != 0)
        period = -(-len(self) // MOST_SAMPLED)
        return Tokens(batch=self.batch, settings=self.settings, rows=self.rows[numbers % period == 0])

    def __len__(self) -> int:
        return len(self.rows)

    def has(self, *names: str) -> bool:
        """Whether every one of these columns holds a value of a loss token; "lag" stands for both versions."""
        return all(self._has(name) for name in names)

    def _has(self, name: str) -> bool:
        if name == "lag":
            return bool((self.lag != UNKNOWN).any())
        if name in self.batch.lacks or name not in self.batch.table.columns():
            return False
        column = self._column(name)
        if name == "kept" or name == "token_id":
            return True
        if column.dtype.kind == "f":
            return not bool(self.missing(name).all())
        return bool((column >= 0).any())  # type: ignore[operator]

    def missing(self, name: str) -> Bools:
        """bool; where a column of numbers has no value."""
        marks = self.batch.table.missing.get(name)
        return np.zeros(len(self), np.bool_) if marks is None else marks[self.rows]

    def _column(self, name: str) -> NDArray[np.generic]:
        return self.batch.table.columns()[name][self.rows]

    def _floats(self, name: str) -> Floats:
        if name in self.batch.table.columns():
            return self._column(name).astype(np.float32, copy=False)
        return np.full(len(self), np.nan, np.float32)

    def _ints(self, name: str) -> Ints:
        if name in self.batch.table.columns():
            return self._column(name).astype(np.int32, copy=False)
        return np.full(len(self), -1, np.int32)

    @cached_property
    def trajectory(self) -> Ints:
        """int32; the trajectory of each."""
        return self._ints("trajectory")

    @cached_property
    def index(self) -> Ints:
        """int32; the position in its trajectory."""
        return self._ints("index")

    @cached_property
    def token_id(self) -> Ints:
        """int32."""
        return self._ints("token_id")

    @cached_property
    def version(self) -> Ints:
        """int32; the version that sampled it, -1: not recorded."""
        return self._ints("version")

    @cached_property
    def trainer_version(self) -> Ints:
        """int32; the version that its update began with, -1: not recorded."""
        return self._ints("trainer_version")

    @cached_property
    def group(self) -> Ints:
        """int32; the group, -1: none."""
        return self._ints("group")

    @cached_property
    def mu(self) -> Floats:
        """float32; the engine's log-prob."""
        return self._floats("logp_mu")

    @cached_property
    def old(self) -> Floats:
        """float32; the log-prob that the trainer took for the old policy's."""
        return self._floats("logp_old")

    @cached_property
    def theta(self) -> Floats:
        """float32; the log-prob of the policy that was optimised."""
        return self._floats("logp_theta")

    @cached_property
    def advantage(self) -> Floats:
        """float32."""
        return self._floats("advantage")

    @cached_property
    def loss_weight(self) -> Floats:
        """float32."""
        return self._floats("loss_weight")

    @cached_property
    def kept(self) -> Bools:
        """bool; what the trainer's own clip and masks left."""
        return self._column("kept").astype(np.bool_, copy=False)

    @cached_property
    def lag(self) -> Ints:
        """int32; versions between sampling and training, or `UNKNOWN`."""
        known = (self.version >= 0) & (self.trainer_version >= 0)
        return np.where(known, self.trainer_version - self.version, UNKNOWN).astype(np.int32)

    @cached_property
    def begins(self) -> Bools:
        """bool; the first loss token of its trajectory."""
        return np.asarray(np.diff(self.trajectory, prepend=-1) != 0)

    @cached_property
    def segment(self) -> Ints:
        """int32; the request that sampled it, numbered through: as recorded, or where positions or versions are cut."""
        cut = self.begins.copy()
        if self.has("segment"):
            cut |= np.diff(self._ints("segment"), prepend=0) != 0
        else:
            cut |= (np.diff(self.index, prepend=0) != 1) | (np.diff(self.version, prepend=0) != 0)
        return np.cumsum(cut).astype(np.int32) - 1

    @cached_property
    def in_doubt(self) -> Bools:
        """bool; mu was not certain of the token."""
        return self.mu < IN_DOUBT

    @cached_property
    def clusters(self) -> Ints:
        """int32; stretches of a trajectory: what a standard error takes for independent of each other."""
        size = max(32, len(self) // 512)
        first = np.flatnonzero(self.begins)
        within = np.arange(len(self)) - np.repeat(first, np.diff(np.append(first, len(self))))
        return np.cumsum(self.begins | (within % size == 0)).astype(np.int32) - 1

    @cached_property
    def is_rounded(self) -> bool:
        """Whether log-probs were rounded to bfloat16: equal numbers may then be of two policies."""
        columns = [column[np.isfinite(column)].view(np.uint32) for column in (self.mu, self.old, self.theta)]
        return all(bool((column & 0xFFFF == 0).all()) for column in columns)

    def stands_in(self, other: Floats) -> bool:
        """Whether OLD is another policy's log-prob, bit for bit, wherever a token was in doubt."""
        where = self.in_doubt & np.isfinite(self.old) & np.isfinite(other)
        equal = where.sum() >= ENOUGH and np.mean(self.old[where] == other[where]) >= ALL
        return bool(equal and not self.is_rounded)

    @cached_property
    def has_own_old(self) -> bool:
        """Whether OLD was recorded and is neither mu nor, at every lag, THETA."""
        return self.has("logp_old") and not self.stands_in(self.mu) and not self.stands_in(self.theta)

    @cached_property
    def log_r_d(self) -> Floats:
        """float32; ``log old - log mu`` where OLD is the token's own; at lag 0 otherwise THETA stands for it; else NaN."""
        if self.has_own_old:
            return self.old - self.mu
        known = np.where(np.isfinite(self.theta), self.theta, self.old) - self.mu
        return np.where(self.lag == 0, known, np.float32(np.nan)).astype(np.float32)

    def names(self, where: Bools, most: int = 3) -> tuple[str, ...]:
        """The first tokens of a mask, as a finding shows them."""
        return tuple(self.batch.table.name_of(int(row)) for row in self.rows[where][:most])


ENOUGH: Final = 32
"""Tokens in doubt on which log-probs that agree in every bit are the same number, not chance."""

ALL: Final = 0.999
"""Share of tokens that is all of them, but for those that rounding makes equal or different."""
