"""The rules between the keys of a recipe about advantages, reference and entropy; docs/regularisers.md. Imports no torch."""

from __future__ import annotations

from operator import attrgetter

from oldlogits.config.objective.sections import ObjectiveConfig
from oldlogits.config.schema import RunConfig
from oldlogits.core.errors import ConfigError
from oldlogits.core.loss import card_of


def check_terms(config: RunConfig) -> None:
    """Refuse groups that their advantages cannot compare, and terms of the objective that would do nothing or something else.

    Raises:
        ConfigError: What is wrong, and what may be meant.
    """
    _check_groups(config)
    _check_reference(config)
    if config.objective.advantage == "turn-to-go" and card_of(config.objective.loss).one_advantage:
        raise ConfigError(
            f"the loss '{config.objective.loss}' has one advantage for a whole sequence",
            got=_said(config, "objective.loss", "objective.advantage"),
            allowed="another objective.advantage, or a loss of tokens, such as masked_is or cispo",
            fix="set objective.advantage = 'mean-only', whose baseline is the same",
        )
    if config.objective.clip_by_lag != "none" and config.objective.clip == "truncated":
        raise ConfigError(
            "a truncation has no clip that could be narrower for older tokens",
            got=_said(config, "objective.clip_by_lag", "objective.clip"),
            allowed="objective.clip = 'ppo', or objective.clip_by_lag = 'none'",
            fix="remove objective.clip_by_lag",
        )
    if config.objective.entropy_bonus and config.trainer.head_kernel == "liger":
        raise ConfigError(
            "liger's kernels give no entropies, and so no bonus",
            got=_said(config, "objective.entropy_bonus", "trainer.head_kernel"),
            allowed="trainer.head_kernel = 'own', or objective.entropy_bonus = 0",
            fix="set trainer.head_kernel = 'own'",
        )


def _check_groups(config: RunConfig) -> None:
    """Refuse groups of one where a group's members are compared with each other, and to leave out all of them."""
    r, is_alone = config.rollout, config.objective.advantage == "batch-baseline"
    if min(r.group_size, r.min_group_size) < 2 and not is_alone:
        raise ConfigError(
            f"objective.advantage = '{config.objective.advantage}' compares a group's members: one by itself has no advantage",
            got=_said(config, "rollout.group_size", "rollout.min_group_size"),
            allowed="2 or more of both, or objective.advantage = 'batch-baseline'",
            fix="set rollout.group_size = 8 and rollout.min_group_size = 2, or objective.advantage = 'batch-baseline'",
        )
    if r.filter_uniform and r.group_size == 1:
        raise ConfigError(
            "the rewards of a group of one are all equal: every group would be left out",
            got=_said(config, "rollout.filter_uniform", "rollout.group_size"),
            allowed="rollout.filter_uniform = false, or a larger group",
            fix="remove rollout.filter_uniform",
        )


def _check_reference(config: RunConfig) -> None:
    """Refuse keys of a reference that is not there, and estimates whose gradient is not that of a divergence."""
    o, default = config.objective, ObjectiveConfig()
    keys = ("kl_in", "kl_estimator", "kl_reference_every")
    if not o.has_reference:
        if given := [key for key in keys if getattr(o, key) != getattr(default, key)]:
            raise ConfigError(
                "there is no reference: these keys have no effect",
                got=_said(config, "objective.kl_coefficient", *(f"objective.{key}" for key in given)),
                allowed="objective.kl_coefficient above 0",
                fix="set objective.kl_coefficient = 0.001, or remove these keys",
            )
        return
    if o.kl_in == "loss" and o.kl_estimate == "k1":
        raise ConfigError(
            "the gradient of k1 in the loss is 0 on average over tokens of the policy itself: noise that pulls nowhere",
            got=_said(config, "objective.kl_in", "objective.kl_estimator"),
            allowed="k2 or k3 in the loss, or k1 in the reward",
            fix="set objective.kl_estimator = 'k2', whose gradient in the loss is that of k1 in the reward",
        )
    if o.kl_in == "reward" and o.advantage == "turn-to-go":
        raise ConfigError(
            "advantages of turns are of what the environment gave, and a divergence in the reward is of the episode",
            got=_said(config, "objective.kl_in", "objective.advantage"),
            allowed="objective.kl_in = 'loss', or another objective.advantage",
            fix="set objective.kl_in = 'loss'",
        )
    if o.kl_in == "reward" and o.kl_estimate != "k1":
        raise ConfigError(
            f"{o.kl_estimate} in the reward has not the gradient of the divergence that it estimates",
            got=_said(config, "objective.kl_in", "objective.kl_estimator"),
            allowed="k1 in the reward",
            fix="remove objective.kl_estimator, or set objective.kl_in = 'loss'",
        )


def _said(config: RunConfig, *keys: str) -> str:
    return ", ".join(f"{key} = {attrgetter(key)(config)!r}" for key in keys)
