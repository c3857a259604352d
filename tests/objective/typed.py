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
aggregate = checked(objective.aggregate)
band_mask = checked(objective.band_mask)
clip_log_ratio = checked(objective.clip_log_ratio)
clip_mask = checked(objective.clip_mask)
decision_sums = checked(objective.decision_sums)
diagnose = checked(objective.diagnose)
exact_variant = checked(objective.exact_variant)
finite_mask = checked(objective.finite_mask)
group_advantages = checked(objective.group_advantages)
kept_mask = checked(objective.kept_mask)
linear_logp = checked(objective.linear_logp)
log_discrepancy = checked(objective.log_discrepancy)
loglinear_logp = checked(objective.loglinear_logp)
split_ratio = checked(objective.split_ratio)
surrogate = checked(objective.surrogate)
to_metrics = checked(objective.to_metrics)
token_weights = checked(objective.token_weights)
truncate_log_ratio = checked(objective.truncate_log_ratio)
weighted_loss = checked(objective.weighted_loss)
