"""The public functions with their shape and dtype annotations checked at every call."""

from collections.abc import Callable
from typing import TypeVar

from beartype import beartype
from jaxtyping import jaxtyped

from oldlogits import objective

F = TypeVar("F", bound=Callable[..., object])


def checked(function: F) -> F:
    return jaxtyped(typechecker=beartype)(function)


a3po_weight_mu = checked(objective.a3po_weight_mu)
at_level = checked(objective.at_level)
band_mask = checked(objective.band_mask)
binary_kl = checked(objective.binary_kl)
clip_log_ratio = checked(objective.clip_log_ratio)
correct = checked(objective.correct)
decision_sums = checked(objective.decision_sums)
diagnose = checked(objective.diagnose)
eps_at_lag = checked(objective.eps_at_lag)
exact_variant = checked(objective.exact_variant)
finite_mask = checked(objective.finite_mask)
flatten_padded = checked(objective.flatten_padded)
group_advantages = checked(objective.group_advantages)
kept_mask = checked(objective.kept_mask)
kl_estimate = checked(objective.kl_estimate)
linear_logp = checked(objective.linear_logp)
log_discrepancy = checked(objective.log_discrepancy)
loglinear_logp = checked(objective.loglinear_logp)
mean_weight = checked(objective.mean_weight)
padded_loss = checked(objective.padded_loss)
regularised = checked(objective.regularised)
split_ratio = checked(objective.split_ratio)
surrogate = checked(objective.surrogate)
to_metrics = checked(objective.to_metrics)
token_weights = checked(objective.token_weights)
truncate_log_ratio = checked(objective.truncate_log_ratio)
unflatten_padded = checked(objective.unflatten_padded)
weighted_loss = checked(objective.weighted_loss)


def aggregate(values, loss_mask, **denominator):
    """The loss of a whole batch at once."""
    return weighted_loss(values, token_weights(loss_mask, **denominator, dtype=values.dtype))


def clip_mask(log_r_s, *arguments, **bounds):
    """The tokens whose ratio the clip leaves as it is."""
    return clip_log_ratio(log_r_s, *arguments, **bounds) == log_r_s
