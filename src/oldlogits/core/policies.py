"""The paper's table of variants as one table, and what follows from each row.

Every log-prob in this package says which policy it came from. A ratio of two policies is written
``THETA / OLD``; a variant is a pair of ratios, and what it needs, its total ratio and whether it corrects
the training-inference mismatch are derived from its row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from oldlogits.core.errors import ConfigError


class Policy(StrEnum):
    """A distribution over the next token. ``/`` builds a `Ratio`."""

    MU = "mu"  # the inference engine, at the version that sampled the token
    OLD = "old"  # the training engine, at that same version: the old logits
    ASYNC = "async"  # the training engine, when the batch enters training
    EWMA = "ewma"  # the training engine, with weights averaged over versions
    AGED = "aged"  # ASYNC, moved towards EWMA by the token's staleness over the average's age
    RESCORE = "rescore"  # MU, less what the engine's numerics do to ASYNC
    BALANCE = "balance"  # the mixture of the inference engine's policies over the versions that sampled the batch
    LINEAR = "linear"  # arithmetic interpolation of MU and THETA
    LOGLINEAR = "loglinear"  # log-linear interpolation of MU and THETA
    THETA = "theta"  # the training engine, now: the policy being optimised
    REFERENCE = "reference"  # the training engine, at an earlier version that THETA is held near

    def __truediv__(self, other: Policy) -> Ratio:
        return Ratio(numerator=self, denominator=other)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """``numerator / denominator`` of the probabilities that two policies give the sampled token."""

    numerator: Policy
    denominator: Policy

    @property
    def is_one(self) -> bool:
        """Whether the ratio is identically 1."""
        return self.numerator is self.denominator

    def __mul__(self, other: Ratio) -> Ratio:
        """The telescoped product: ``OLD/MU * THETA/OLD == THETA/MU``."""
        if self.is_one:
            return other
        if other.is_one:
            return self
        if self.numerator is other.denominator:
            return Ratio(numerator=other.numerator, denominator=self.denominator)
        raise ConfigError(
            f"the ratios {self} and {other} do not telescope",
            got=f"numerator {self.numerator} over denominator {other.denominator}",
            allowed="r_d = X/MU with r_s = THETA/X, or r_d = 1",
            fix="use one proximal policy X in both ratios",
        )

    def __str__(self) -> str:
        return "1" if self.is_one else f"{self.numerator}/{self.denominator}"


MU, OLD, ASYNC, EWMA, AGED, RESCORE = Policy.MU, Policy.OLD, Policy.ASYNC, Policy.EWMA, Policy.AGED, Policy.RESCORE
BALANCE: Final = Policy.BALANCE
LINEAR, LOGLINEAR, THETA, REFERENCE = Policy.LINEAR, Policy.LOGLINEAR, Policy.THETA, Policy.REFERENCE
ONE: Final = MU / MU

AT_LOSS_TIME: Final = frozenset({MU, THETA, LINEAR, LOGLINEAR})
"""Policies that need no source: MU comes with the trajectory, THETA from the forward pass, the rest from both."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One row of the paper's table: ``r_d`` multiplies and masks, ``r_s`` is clipped."""

    r_d: Ratio
    r_s: Ratio

    def __post_init__(self) -> None:
        if self.total.numerator is not THETA:
            raise ConfigError(
                f"r_d = {self.r_d} and r_s = {self.r_s} do not describe an update of THETA",
                got=f"a total ratio {self.total}",
                allowed="a total ratio THETA / X",
                fix="let r_s be THETA / X",
            )

    @property
    def proximal(self) -> Policy:
        """The policy that ``r_s`` is taken over: OLD itself, or another policy in its place."""
        return self.r_s.denominator

    @property
    def total(self) -> Ratio:
        """``r_d * r_s``, telescoped."""
        return self.r_d * self.r_s

    @property
    def corrects_mismatch(self) -> bool:
        """Whether the total ratio is over what the engine sampled from; the other rows leave the mismatch uncorrected."""
        return self.total.denominator in (MU, BALANCE)

    @property
    def needs(self) -> frozenset[Policy]:
        """The policies whose log-probs a source must provide: empty, or one policy."""
        used = {self.r_s.numerator, self.r_s.denominator}
        if not self.r_d.is_one:
            used |= {self.r_d.numerator, self.r_d.denominator}
        return frozenset(used) - AT_LOSS_TIME


VARIANTS: Final[Mapping[str, Variant]] = MappingProxyType(
    {
        "ppo_clip": Variant(r_d=ONE, r_s=THETA / OLD),
        "ppo_clip_train_infer": Variant(r_d=ONE, r_s=THETA / MU),
        "decoupled_exact": Variant(r_d=OLD / MU, r_s=THETA / OLD),
        "decoupled_async": Variant(r_d=ASYNC / MU, r_s=THETA / ASYNC),
        "linear_prox": Variant(r_d=ONE, r_s=THETA / LINEAR),
        "loglinear_prox": Variant(r_d=ONE, r_s=THETA / LOGLINEAR),
        "ppo_ewma": Variant(r_d=ONE, r_s=THETA / EWMA),
        "ppo_ewma_train_infer": Variant(r_d=EWMA / MU, r_s=THETA / EWMA),
    }
)
"""The paper's table (PAPER.md, "One frame for all variants: masked importance sampling")."""

EXPERIMENTAL_VARIANTS: Final[Mapping[str, Variant]] = MappingProxyType(
    {
        "linear_train_infer": Variant(r_d=LINEAR / MU, r_s=THETA / LINEAR),
        "loglinear_train_infer": Variant(r_d=LOGLINEAR / MU, r_s=THETA / LOGLINEAR),
        "aged_train_infer": Variant(r_d=AGED / MU, r_s=THETA / AGED),
        "rescore_train_infer": Variant(r_d=RESCORE / MU, r_s=THETA / RESCORE),
        "mis_balance": Variant(r_d=ONE, r_s=THETA / BALANCE),
    }
)
"""Rows that the paper's table does not list: those that its Proposition 1 speaks of, and proximal policies of our own."""


class Provenance(StrEnum):
    """How the proximal policy's log-prob of one token was obtained. A source may say so itself (`Scored.provenance`)."""

    EXACT = "exact"  # the training engine's forward at the token's own version, fresh keys and values
    MIXED_KV = "mixed_kv"  # the same, over entries of the older versions that computed them in the engine
    ASYNC = "async"
    EWMA = "ewma"
    AGED = "aged"
    RESCORE = "rescore"
    BALANCE = "balance"
    LINEAR = "linear"
    LOGLINEAR = "loglinear"
    MU = "mu"


PROXIMAL_PROVENANCE: Final[Mapping[Policy, Provenance]] = MappingProxyType(
    {OLD: Provenance.EXACT} | {p: Provenance(p) for p in (ASYNC, EWMA, AGED, RESCORE, BALANCE, LINEAR, LOGLINEAR, MU)}
)
"""The provenance of tokens of fresh keys and values, by the variant's proximal policy, whichever source provides it."""


def find_variant(name: str) -> Variant:
    """The variant of that name, from `VARIANTS` or `EXPERIMENTAL_VARIANTS`."""
    variant = VARIANTS.get(name) or EXPERIMENTAL_VARIANTS.get(name)
    if variant is None:
        names = ", ".join([*VARIANTS, *EXPERIMENTAL_VARIANTS])
        raise ConfigError("unknown variant", got=repr(name), allowed=names, fix="choose one of these")
    return variant
