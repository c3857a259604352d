"""What a check says of a batch, with its evidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from oldlogits.doctor.tokens import Bools, Tokens

Outcome = Literal["finding", "healthy", "cannot-tell"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a check says.

    Args:
        outcome: Whether something is wrong, nothing is, or the dump does not hold enough to tell.
        says: The evidence in one or two sentences.
        num_tokens: How many loss tokens are concerned.
        num_read: How many loss tokens the check has read.
        where: Some of the tokens concerned.
        figures: The numbers behind the sentence, by name.
    """

    outcome: Outcome
    says: str
    num_tokens: int = 0
    num_read: int = 0
    where: tuple[str, ...] = ()
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class AtLag:
    """The two factors of the ratio, and the trainer's decisions, of tokens of one lag.

    Args:
        source: The file.
        lag: Versions between sampling and training.
        num_tokens: Loss tokens whose OLD was computed.
        log_r_d: Mean |log old - log mu|.
        log_r_s: Mean |log theta - log old|; NaN without THETA.
        changed: Tokens that clip and band keep or drop otherwise with OLD.
        changed_weight: Their share of the weight |R A| of what OLD keeps.
    """

    source: str
    lag: int
    num_tokens: int
    log_r_d: float
    log_r_s: float
    changed: int
    changed_weight: float


def finding(
    says: str,
    tokens: Tokens,
    where: Bools | None = None,
    *,
    shown: Bools | None = None,
    read: Sequence[Tokens] = (),
    **figures: float,
) -> Verdict:
    """Something is wrong.

    Args:
        says: The evidence.
        tokens: The tokens that the check has looked at.
        where: Those concerned; None: all of them, and none is to be shown.
        shown: The tokens that the first few names are taken of; None: those concerned.
        read: What it has read, where that is more than `tokens`.
        figures: The numbers behind the sentence.
    """
    shown = where if shown is None else shown
    return Verdict(
        outcome="finding",
        says=says,
        num_tokens=len(tokens) if where is None else int(where.sum()),
        num_read=sum(map(len, read or (tokens,))),
        where=() if shown is None else tokens.names(shown),
        figures=figures,
    )


def healthy(says: str, *read: Tokens, **figures: float) -> Verdict:
    """Nothing is wrong that the check would see in the tokens that it has read."""
    return Verdict(outcome="healthy", says=says, num_read=sum(map(len, read)), figures=figures)


def cannot_tell(says: str) -> Verdict:
    """The dump does not hold what the check needs."""
    return Verdict(outcome="cannot-tell", says=says)
