"""The rules about a loss, its own knobs and the correction of r_d; each stands on the loss's card. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields

from oldlogits.config.objective.sections import ObjectiveConfig
from oldlogits.config.reader import Table, as_written, build, stray
from oldlogits.config.reader import nearest_key as nearest
from oldlogits.config.schema import RunConfig
from oldlogits.core.errors import ConfigError
from oldlogits.core.loss import card_of
from oldlogits.core.objective.cards import R_S_BOUNDS
from oldlogits.core.policies import LINEAR, LOGLINEAR, MU, find_variant


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

    try:
        return build(kind, options, unknown)
    except ConfigError as error:
        if error.got.startswith("objective.options"):
            raise
        what = f"objective.options of loss '{loss}': {error.what}"
        raise ConfigError(what, got=error.got, allowed=error.allowed, fix=error.fix) from error


def check_loss(config: RunConfig) -> None:
    """Refuse knobs that the loss does not have, bounds that it does not read, and a correction that cannot act.

    Raises:
        ConfigError: What it does not read, or what cannot act.
    """
    o, card, variant = config.objective, card_of(config.objective.loss), find_variant(config.variant)
    options_of(o.loss, o.options)
    defaults = {field.name: field.default for field in fields(ObjectiveConfig) if field.default is not MISSING}
    idle = [name for name in R_S_BOUNDS if name not in card.bounds and getattr(o, name) != defaults[name]]
    if idle:
        raise ConfigError(
            f"loss '{o.loss}' does not read objective.{idle[0]}",
            got=f"objective.{idle[0]} = {as_written(getattr(o, idle[0]))}",
            allowed=", ".join(f"objective.{name}" for name in card.bounds) or "the loss's own objective.options",
            fix=f"remove objective.{idle[0]}",
        )
    if card.step_rule and variant.proximal in (MU, LINEAR, LOGLINEAR):
        raise ConfigError(
            f"loss '{o.loss}' compares the proximal policy with MU before the forward pass of THETA",
            got=f"variant = '{config.variant}', whose proximal policy is {variant.proximal.name}",
            allowed="a variant whose proximal policy a source provides",
            fix=f"use variant '{card.variant}'",
        )
    if config.audit.share > 0 and (card.step_rule or not card.has_active_set):
        raise ConfigError(
            f"the audit compares active sets, and that of loss '{o.loss}' does not say what it does to a batch",
            got=f"audit.share = {config.audit.share:g}",
            allowed="audit.share = 0, or a loss that masks token by token",
            fix="set audit.share = 0",
        )
    _check_correction(config)


def _check_correction(config: RunConfig) -> None:
    """Refuse bounds of a ratio that is 1, weights that do not weigh, and a denominator that the rejection would change."""
    own, variant, weighs = config.correction, find_variant(config.variant), config.objective.mismatch_correction
    changed = [field.name for field in fields(own) if getattr(own, field.name) != field.default]
    of_r_d = [name for name in changed if name.startswith(("weight", "token", "normalise"))]
    if own.ratio == "mismatch":
        of_r_d += [name for name in changed if name.startswith(("reject", "veto"))]
    if variant.r_d.is_one and of_r_d:
        raise ConfigError(
            f"r_d of variant '{config.variant}' is 1, so that nothing is there to correct",
            got=f"correction.{of_r_d[0]} = {as_written(getattr(own, of_r_d[0]))}",
            allowed="a variant whose r_d is a ratio; rejections also with correction.ratio = 'total'",
            fix=f"remove correction.{of_r_d[0]}, or use variant 'decoupled_exact'",
        )
    of_weight = [name for name in changed if name.startswith(("weight", "normalise"))]
    if weighs == "mask" and of_weight:
        raise ConfigError(
            "r_d only masks, and this is about its weight",
            got=f"correction.{of_weight[0]} = {as_written(getattr(own, of_weight[0]))}, objective.mismatch_correction = 'mask'",
            allowed="objective.mismatch_correction = 'weight_and_mask'",
            fix=f"remove correction.{of_weight[0]}",
        )
    if own.reject == "none" and any(name in changed for name in ("reject_low", "reject_high")):
        got = f"correction.reject = 'none', correction.reject_high = {own.reject_high:g}"
        raise ConfigError("no ratio of a sequence is rejected", got=got, allowed="a reject", fix="set correction.reject")
    if own.ratio == "total" and not own.rejects:
        raise ConfigError(
            "correction.ratio says what reject and veto look at, and there is neither",
            got="correction.ratio = 'total'",
            allowed="'mismatch', or a reject or veto",
            fix="remove correction.ratio",
        )
    if config.objective.loss_aggregation == "token-mean-kept" and own.ratio == "total":
        raise ConfigError(
            "the denominator counts what is kept before the first micro-batch, and theta/mu is known after it",
            got="objective.loss_aggregation = 'token-mean-kept', correction.ratio = 'total'",
            allowed="another loss_aggregation",
            fix="set objective.loss_aggregation = 'token-mean'",
        )
    if config.correction.normalise and variant.proximal in (LINEAR, LOGLINEAR):
        raise ConfigError(
            f"the weights of variant '{config.variant}' are known in the forward pass that trains them",
            got="correction.normalise = true",
            allowed="a variant whose r_d a source provides",
            fix="remove correction.normalise",
        )
