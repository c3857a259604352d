"""The built-in losses as one table: what each does, where it is from, and what a recipe must know of it. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from oldlogits.core.objective.options import (
    CispoOptions,
    DppoKlOptions,
    DppoOptions,
    FlashOptions,
    GmpoOptions,
    KPopOptions,
    LagClipOptions,
    LevelOptions,
    M2poOptions,
    OpsmOptions,
    ReinforceOptions,
    SapoOptions,
    ToprOptions,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LossCard:
    """What is known of a loss without importing it. A loss from outside may have one as its attribute ``card``.

    Args:
        what: What it does to a token, in a line.
        paper: The paper, or the code, that the formula is from.
        variant: The row of the paper's table that is the paper's own; every other row may be used.
        options: The class of its own knobs, a dataclass with ranges in the annotations; None: it has none.
        bounds: The recipe's bounds on r_s that it reads; another one that is not the default is refused.
        has_active_set: Whether its masks say all of what r_s does; the audit, which compares them, is refused where not.
        is_guarded: Whether the rules of config/guard.py, which are about the band and the PPO clip, are about this loss.
        step_rule: The import path of a function from all tokens of an optimizer step (`LossInputs` without THETA) and the
            `Objective` to a bool [token], which each micro-batch receives its part of; empty: there is none.
    """

    what: str
    paper: str
    variant: str
    options: type | None = None
    bounds: tuple[str, ...] = ()
    has_active_set: bool = True
    is_guarded: bool = False
    step_rule: str = ""


R_S_BOUNDS: Final = ("eps_low", "eps_high", "dual_clip", "clip", "is_cap")
"""The recipe's bounds on r_s, of which each loss reads some."""

OUTSIDE: Final = LossCard(what="a loss from outside", paper="-", variant="-", bounds=R_S_BOUNDS)

CARDS: Final[Mapping[str, LossCard]] = MappingProxyType(
    {
        "masked_is": LossCard(
            what="PPO's clip of r_s, sign-aware, with a dual clip, or truncation; r_d weighs and masks",
            paper="2605.12070, 1707.06347, 1912.09729",
            variant="decoupled_exact",
            bounds=R_S_BOUNDS,
            is_guarded=True,
        ),
        "gspo": LossCard(
            what="PPO's clip of the geometric mean of r_s over a sequence",
            paper="2507.18071, eq. 14-15",
            variant="ppo_clip",
            options=LevelOptions,
            bounds=("eps_low", "eps_high"),
        ),
        "gmpo": LossCard(
            what="the geometric mean over a sequence of r_s, each clipped on a log scale",
            paper="2507.20673",
            variant="ppo_clip",
            options=GmpoOptions,
        ),
        "cispo": LossCard(
            what="clips the weight r_s of log theta and masks nothing",
            paper="2506.13585, eq. 4-5",
            variant="ppo_clip",
            options=CispoOptions,
            has_active_set=False,
        ),
        "sapo": LossCard(
            what="a sigmoid of r_s in place of the clip",
            paper="2511.20347",
            variant="ppo_clip",
            options=SapoOptions,
            has_active_set=False,
        ),
        "dppo_tv": LossCard(
            what="masks a token whose probability moved too far, outwards",
            paper="2602.04879, eq. 13",
            variant="ppo_clip_train_infer",
            options=DppoOptions,
        ),
        "dppo_kl": LossCard(
            what="masks a token whose binary KL divergence is too large, outwards",
            paper="2602.04879, eq. 14",
            variant="ppo_clip_train_infer",
            options=DppoKlOptions,
        ),
        "dis": LossCard(
            what="masks a token outside of [1 - eps_low, 1 + eps_high], whatever A's sign",
            paper="2607.07508 (SAO), eq. 1-3",
            variant="ppo_clip_train_infer",
            bounds=("eps_low", "eps_high"),
        ),
        "kpop": LossCard(
            what="masks a token whose binary KL divergence is too large in either direction",
            paper="2606.15079",
            variant="ppo_clip_train_infer",
            options=KPopOptions,
        ),
        "flash_reinforce": LossCard(
            what="masks a sequence whose mean binary KL divergence is too large",
            paper="FlashREINFORCE (NVIDIA, 2026)",
            variant="ppo_clip_train_infer",
            options=FlashOptions,
        ),
        "topr": LossCard(
            what="positive sequences weigh 1, negative ones min(r_s, 1) of the whole sequence",
            paper="2503.14286",
            variant="ppo_clip_train_infer",
            options=ToprOptions,
            has_active_set=False,
        ),
        "reinforce": LossCard(
            what="log theta weighted by r_s of a level, truncated or masked",
            paper="verl rollout correction (2512.23075)",
            variant="ppo_clip_train_infer",
            options=ReinforceOptions,
            has_active_set=False,
        ),
        "m2po": LossCard(
            what="no clip; masks the tokens with the largest log (X / mu) until their second moment is small",
            paper="2510.01161",
            variant="decoupled_async",
            options=M2poOptions,
            step_rule="oldlogits.objective.losses.m2po:small_second_moment",
        ),
        "opsm": LossCard(
            what="PPO's clip, and masks negative sequences that drifted from mu",
            paper="2512.02556, eq. 9",
            variant="ppo_clip",
            options=OpsmOptions,
            bounds=("eps_low", "eps_high", "dual_clip"),
        ),
        "lag_clip": LossCard(
            what="PPO's clip, which closes with the known staleness of a token",
            paper="own, after 2607.18722 (SAT)",
            variant="decoupled_exact",
            options=LagClipOptions,
            bounds=("eps_low", "eps_high", "dual_clip"),
        ),
    }
)
"""The built-in losses, and what is known of each."""
