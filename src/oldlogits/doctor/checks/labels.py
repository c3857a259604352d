"""Versions: whether they are there, can be, and are those of the tokens that they stand beside."""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from oldlogits.doctor.checks.policies import LARGER
from oldlogits.doctor.statistics import difference, log_size
from oldlogits.doctor.tokens import UNKNOWN, Bools, Floats, Ints, Tokens
from oldlogits.doctor.verdicts import Verdict, cannot_tell, finding, healthy

_DRIFT: Final = math.log(1.2)
"""The same for the drift of THETA from mu, which engines' kernels do not move."""


def versions_missing(tokens: Tokens) -> Verdict:
    """Loss tokens without a version, among others that have one."""
    if tokens.has("trainer_version") and not tokens.has("version"):
        return cannot_tell("no token has the version that sampled it")
    absent = tokens.version < 0
    if not absent.any():
        return healthy("every loss token has a version", tokens)
    if absent.all():
        return cannot_tell("no token has the version that sampled it")
    return finding(
        f"{absent.sum():,} of {len(tokens):,} loss tokens have no version of the weights that sampled them", tokens, absent
    )


def versions_impossible(tokens: Tokens) -> Verdict:
    """Versions that fall within a trajectory, or are ahead of the trainer's."""
    if tokens.batch.contradictions:
        return finding("; ".join(tokens.batch.contradictions), tokens)
    known = tokens.version >= 0
    if not known.any():
        return cannot_tell("no token has the version that sampled it")
    version, trajectory = tokens.version[known], tokens.trajectory[known]
    falls = np.zeros(len(tokens), np.bool_)
    falls[np.flatnonzero(known)[1:]] = (np.diff(version) < 0) & (np.diff(trajectory) == 0)
    ahead = (tokens.lag < 0) & (tokens.lag != UNKNOWN)
    if not (falls | ahead).any():
        return healthy("versions never fall within a trajectory, and none is ahead of the trainer's", tokens)
    says = f"versions fall within a trajectory at {falls.sum():,} tokens, and are ahead of the trainer's on {ahead.sum():,}"
    return finding(says, tokens, falls | ahead, falling=float(falls.sum()), ahead=float(ahead.sum()))


def version_per_group(tokens: Tokens) -> Verdict:
    """One version for a whole group, though its later segments were sampled by newer weights."""
    tokens = tokens.sample
    holder = tokens.group if tokens.has("group") else tokens.trajectory
    if _varies(tokens.version, holder):
        return healthy("versions change within groups", tokens)
    first = np.flatnonzero(tokens.begins)
    lengths = np.diff(np.append(first, len(tokens)))
    number = tokens.segment - np.repeat(tokens.segment[first], lengths)
    last = np.repeat(number[first + lengths - 1], lengths)
    several, moved, larger = last > 0, *_moved(tokens)
    if not several.any():
        return healthy("every trajectory is one segment", tokens)
    use = several & ((number == 0) | (number == last)) & np.isfinite(moved) & tokens.in_doubt
    found = difference(log_size(moved[use], tokens.mu[use]), number[use] > 0, tokens.clusters[use])
    if not found.is_known:
        return cannot_tell("every group has one version, and there are too few segments to see whether it is that of all")
    if found.differs(larger):
        says = (
            f"a group has one version, but disagreement is {math.exp(found.value):.2f} times as large in the last segment as "
            f"in the first (log {found}): they were sampled by other weights than the label says"
        )
        return finding(says, tokens, several & (number > 0), shown=several & (number == last), times=math.exp(found.value))
    return healthy(f"every group has one version, and nothing shows another in later segments (log {found})", tokens)


def labels_late(tokens: Tokens) -> Verdict:
    """Labels one request late or early: tokens at a change of versions are unlike others of their label."""
    tokens = tokens.sample
    begins = tokens.begins | (np.diff(tokens.version, prepend=-2) != 0)
    first = np.flatnonzero(begins)
    lengths = np.diff(np.append(first, len(tokens)))
    if len(first) == int(tokens.begins.sum()):
        return healthy("no trajectory has several versions", tokens)
    place = np.arange(len(tokens)) - np.repeat(first, lengths)
    number = tokens.segment - np.repeat(tokens.segment[first], lengths)
    num = np.repeat(number[first + lengths - 1], lengths)
    length = np.repeat(lengths, lengths)
    ends = np.where(num > 0, number == num, 2 * place >= length)
    starts = np.where(num > 0, number == 0, 2 * place < length)
    after_change = np.repeat(~tokens.begins[first], lengths)
    before_change = np.repeat(np.append(~tokens.begins[first[1:]], False), lengths)
    moved, larger = _moved(tokens)
    for run, part, said in ((before_change, ends, "before"), (after_change, starts, "after")):
        use = run & np.isfinite(moved) & tokens.in_doubt
        found = difference(log_size(moved[use], tokens.mu[use]), part[use], tokens.clusters[use])
        if found.differs(larger):
            says = (
                f"tokens just {said} a change of versions disagree {math.exp(found.value):.2f} times as much as others of the "
                f"same label (log {found}): the labels are {'late' if said == 'before' else 'early'}, one request off"
            )
            return finding(says, tokens, run & part, times=math.exp(found.value))
    return healthy("tokens at a change of versions are like others of their label", tokens)


def _moved(tokens: Tokens) -> tuple[Floats, float]:
    """What shows another version, and what it may vary by: r_d where OLD is the token's own, or THETA against mu."""
    if tokens.has_own_old:
        return tokens.old - tokens.mu, LARGER
    return tokens.theta - tokens.mu, _DRIFT


def _varies(values: Ints, holders: Ints) -> bool:
    """Whether some holder has several values."""
    order = np.argsort(holders, kind="stable")
    same: Bools = np.diff(holders[order]) == 0
    return bool((np.diff(values[order])[same] != 0).any())
