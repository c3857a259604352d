"""The loss of an update: one seam for every objective, and the registry of the built-in ones.

    log-probs by policy, advantages, staleness, sequence index --loss--> each token's surrogate, ratios and masks
    each token's share of the batch (loss_aggregation) -----------------> -sum share * surrogate, backward, metrics, tables

The trainer knows nothing about a loss but this. It splits the batch into micro-batches and over ranks, counts the
denominator over the whole optimizer step, and reads the metrics off the ratios and masks that a loss returns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, Protocol, TypeVar

from oldlogits.core.errors import ConfigError
from oldlogits.core.objective.cards import CARDS, OUTSIDE, LossCard
from oldlogits.core.objective.correction import BAND_ALONE, Correction
from oldlogits.core.policies import Policy, Variant
from oldlogits.core.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """The knobs of a recipe's objective. A loss reads those that it has a use for.

    Args:
        variant: The row of the paper's table: which policies r_d and r_s are taken over.
        band: The mismatch band [1/band, band] on r_d, above 1; inf: no band.
        eps_low: The clip of r_s from below, 1 - eps_low, for negative advantages.
        eps_high: The clip of r_s from above, 1 + eps_high, for positive advantages.
        dual_clip: The upper bound of r_s for negative advantages, above 1; None: there is none.
        mismatch_correction: What r_d does: it weights and masks tokens, or it masks them only.
        is_cap: With ``objective.clip = "truncated"``: the largest weight r_s of a token's gradient; None: the clip holds.
        correction: What bounds r_d beside the band.
        options: The loss's own knobs, of the class that its card names; None: their defaults.
        clip_by_lag: How eps_low and eps_high shrink with a token's staleness.
    """

    variant: Variant
    band: float = 1.5
    eps_low: float = 0.2
    eps_high: float = 0.28
    dual_clip: float | None = 3.0
    mismatch_correction: Literal["weight_and_mask", "mask"] = "weight_and_mask"
    is_cap: float | None = None
    correction: Correction = BAND_ALONE
    options: object = None
    clip_by_lag: Literal["none", "inverse", "inverse-sqrt"] = "none"

    def own(self, kind: type[T]) -> T:
        """Give the loss's own knobs, or their defaults where the recipe has none.

        Raises:
            ConfigError: They are those of another loss.
        """
        if self.options is None:
            return kind()
        if not isinstance(self.options, kind):
            got, fix = type(self.options).__name__, f"pass options = {kind.__name__}(...)"
            raise ConfigError("these are the knobs of another loss", got=got, allowed=kind.__name__, fix=fix)
        return self.options


@dataclass(frozen=True, slots=True, kw_only=True)
class LossInputs:
    """The tokens of one micro-batch, as a loss receives them. All tensors are [token] and on one device.

    Args:
        logp: Natural-log probability of each sampled token, by policy: MU, THETA, and the variant's proximal policy; REFERENCE
            where the recipe has one. Only those of THETA carry a gradient.
        advantages: float32; one value for all tokens of a sequence, or of a turn with ``objective.advantage = "turn-to-go"``.
        loss_mask: bool; True where a token is trained. Context tokens are left out beforehand, so today all are True.
        staleness: int64; the trainer's version minus the version that sampled the token.
        sequence_index: int64, in [0, num_sequences); the trajectory that a token belongs to.
        num_sequences: The number of trajectories of the whole batch, of which a micro-batch holds some.
        step_mask: bool; what the loss's step rule (`LossCard.step_rule`) keeps of the optimizer step; None: it has none.
    """

    logp: Mapping[Policy, Tensor]
    advantages: Tensor
    loss_mask: Tensor
    staleness: Tensor
    sequence_index: Tensor
    num_sequences: int
    step_mask: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LossTerms:
    """What a loss makes of each token. All tensors are [token].

    Args:
        values: The surrogate S, to be maximised, with the gradient that reaches THETA's log-probs; 0 for a masked token.
        log_r_d: The log of the mismatch ratio that the loss used; 0 where it used none.
        log_r_s: The log of the ratio that the loss clipped. Where it belongs to a sequence, each of its tokens has it.
        band_mask: bool; False for a token that the loss left out because of r_d.
        clip_mask: bool; False for a token that has no gradient because of r_s.

    Raises:
        ConfigError: The tensors are not of one shape.
    """

    values: Tensor
    log_r_d: Tensor
    log_r_s: Tensor
    band_mask: Tensor
    clip_mask: Tensor

    def __post_init__(self) -> None:
        names = ("values", "log_r_d", "log_r_s", "band_mask", "clip_mask")
        shapes = {name: tuple(getattr(self, name).shape) for name in names}
        if len(set(shapes.values())) > 1 or len(shapes["values"]) != 1:
            raise ConfigError(
                "a loss returns one value per token",
                got=", ".join(f"{name} {shape}" for name, shape in shapes.items()),
                allowed="five tensors of shape (tokens,)",
                fix="give each token of a sequence the sequence's value: values[sequence_index]",
            )

    @property
    def active_mask(self) -> Tensor:
        """Bool [token]; True where neither mask leaves a token out."""
        return self.band_mask & self.clip_mask


class Loss(Protocol):
    """A function from the tokens of a micro-batch to their surrogates.

    A micro-batch holds whole sequences: all trained tokens of a trajectory are in the same micro-batch, on one rank, in the
    order in which they were sampled. So a loss may form a value per sequence, such as the geometric mean of its tokens'
    ratios, from ``sequence_index`` alone. It may not compare sequences with each other, since it sees only some of them: the
    trainer has done that already (advantages), or does it afterwards (``loss_aggregation``).
    """

    def __call__(self, tokens: LossInputs, objective: Objective) -> LossTerms:
        """Form the surrogate of each token, in the order of the tokens.

        Raises:
            MissingLogprobError: A policy that the loss needs is not among the log-probs.
        """


_MODULES: Final = {"dppo_tv": "dppo", "dppo_kl": "dppo"}

LOSSES: Final = Registry[Loss](
    "loss",
    key="objective.loss",
    builtin={name: f"oldlogits.objective.losses.{_MODULES.get(name, name)}:{name}" for name in CARDS},
    needs=("__call__",),
)
"""The built-in losses by name; a recipe may name any other one as "package.module:function"."""


def card_of(name: str) -> LossCard:
    """Give the card of a built-in loss, or that of one from outside, which may have none.

    Raises:
        ConfigError: There is no such loss.
    """
    if name in CARDS:
        return CARDS[name]
    found: object = LOSSES.find(name)
    card = found.card if hasattr(found, "card") else OUTSIDE
    if not isinstance(card, LossCard):
        raise ConfigError("a loss's card is a LossCard", got=repr(card), allowed="oldlogits.core.loss.LossCard", fix="make one")
    return card


class StepRule(Protocol):
    """What keeps some tokens of a whole optimizer step, known before its first micro-batch."""

    def __call__(self, tokens: LossInputs, objective: Objective) -> Tensor:
        """Give bool [token]; THETA is not among the log-probs."""


STEP_RULES: Final = Registry[StepRule]("step rule", key="objective.loss", builtin={}, needs=("__call__",))
"""The step rules that cards name by their import paths."""
