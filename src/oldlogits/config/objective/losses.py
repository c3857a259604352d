"""The rules about a loss, its own knobs and the correction of r_d; each stands on the loss's card. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from math import inf
from operator import attrgetter
from typing import Final

from oldlogits.config.objective.sections import ObjectiveConfig
from oldlogits.config.reader import Table, as_written, build, stray
from oldlogits.config.reader import nearest_key as nearest
from oldlogits.config.schema import RunConfig
from oldlogits.core.errors import ConfigError
from oldlogits.core.loss import card_of
from oldlogits.core.objective.cards import R_S_BOUNDS
from oldlogits.core.objective.correction import Correction
from oldlogits.core.policies import LINEAR, LOGLINEAR, MU, find_variant

_MASK: Final = "objective.mismatch_correction"
_KEPT: Final = "objective.loss_aggregation"


def options_of(loss: str, options: Mapping[str, object]) -> object:
    """Build a loss's own knobs from the table of a recipe; None for a loss without some.

    Raises:
        ConfigError: A key is unknown, a value has another type or is out of range.

    Example:
        >>> options_of("cispo", {"high": 4})
        CispoOptions(low=0.0, high=4.0)
    """
    kind = card_of(loss).options
    if kind is None:
        if options:
            what, got = f"loss '{loss}' has no knobs of its own", f"objective.options = {dict(options)}"
            raise ConfigError(what, got=got, allowed="no options", fix="remove them, or use another loss")
        return None
    names = {field.name: f"objective.options.{field.name}" for field in fields(kind)}

    def unknown(key: str, table: Table) -> ConfigError:
        error = stray(f"objective.options.{key}", nearest(key, names))
        knobs = ", ".join(names) + f" (loss '{loss}')"
        return ConfigError(f"loss '{loss}' has no such knob", got=error.got, allowed=knobs, fix=error.fix)

    return build(kind, options, unknown)


def check_loss(config: RunConfig) -> None:
    """Refuse knobs that the loss does not have, bounds that it does not read, and a correction that cannot act."""
    o, own, card, variant = config.objective, config.correction, card_of(config.objective.loss), find_variant(config.variant)
    options_of(o.loss, o.options)
    default = {field.name: field.default for field in fields(ObjectiveConfig)}
    idle = [f"objective.{name}" for name in R_S_BOUNDS if name not in card.bounds and getattr(o, name) != default[name]]
    changed = [f"correction.{field.name}" for field in fields(own) if getattr(own, field.name) != field.default]
    of_weight = _about(changed, "weight", "normalise")
    of_sequences = _about(changed, "reject", "veto")
    of_r_d = of_weight + _about(changed, "token") + (of_sequences if own.ratio == "mismatch" else [])
    of_none = _idle_in_rejection(own, changed)
    of_nothing = _about(changed, "ratio") if not own.rejects else []
    early, kept = variant.proximal in (LINEAR, LOGLINEAR), o.loss_aggregation == "token-mean-kept"
    named, row = f"loss '{o.loss}'", f"variant '{config.variant}'"
    audited = config.audit.share > 0 and (bool(card.step_rule) or not card.has_active_set)
    total = own.ratio == "total" and kept
    a_ratio = "a variant whose r_d is a ratio; rejections also with correction.ratio = 'total'"
    rules: tuple[tuple[bool, list[str], str, str], ...] = (
        (bool(idle), idle[:1], f"{named} does not read it", ", ".join(card.bounds) or "the loss's own objective.options"),
        (variant.r_d.is_one and bool(of_r_d), of_r_d[:1], f"r_d of {row} is 1, so that nothing is there to correct", a_ratio),
        (
            o.mismatch_correction == "mask" and bool(of_weight),
            [*of_weight[:1], _MASK],
            "r_d only masks, and this is about its weight",
            "'weight_and_mask'",
        ),
        (bool(of_none), of_none[:1], "no ratio of a sequence is rejected by it", "a correction.reject with a bound"),
        (
            bool(of_nothing),
            of_nothing,
            "it says what reject and veto look at, and there is neither",
            "a reject, a veto, or 'mismatch'",
        ),
        (total, ["correction.ratio", _KEPT], "the denominator is counted before theta/mu is known", "another loss_aggregation"),
        (
            own.normalise and early,
            ["correction.normalise", "variant"],
            f"the weights of {row} are known in the forward pass that trains them",
            "a variant whose r_d a source provides",
        ),
        (
            bool(card.step_rule) and (early or variant.proximal is MU),
            ["objective.loss", "variant"],
            f"{named} compares the proximal policy with MU before the forward pass of THETA",
            "a variant whose proximal policy a source provides",
        ),
        (
            audited,
            ["audit.share", "objective.loss"],
            f"the audit compares active sets, and that of {named} does not say what it does",
            "audit.share = 0",
        ),
    )
    for is_wrong, keys, what, allowed in rules:
        if is_wrong:
            got = ", ".join(f"{key} = {as_written(attrgetter(key)(config))}" for key in keys)
            raise ConfigError(f"{keys[0]}: {what}", got=got, allowed=allowed, fix=f"change or remove {keys[0]}")


def _idle_in_rejection(own: Correction, changed: list[str]) -> list[str]:
    """Name the keys of a rejection that reject nothing: bounds of none, no bound, and a lower one with k3, which has none."""
    if own.reject == "none":
        return _about(changed, "reject_low", "reject_high")
    if own.reject == "k3" and own.reject_low > 0:
        return ["correction.reject_low"]
    return ["correction.reject"] if own.reject_low == 0 and own.reject_high == inf else []


def _about(keys: list[str], *names: str) -> list[str]:
    return [key for key in keys if key.removeprefix("correction.").startswith(names)]
