"""The methods that a study compares, as one table: a row is what it sets in a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Final

from oldlogits.core.errors import ConfigError
from oldlogits.core.loss import LOSSES
from oldlogits.core.policies import find_variant

Value = str | int | float | bool
Settings = Mapping[str, Value]
"""Recipe keys, dotted, and their values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One way to correct: a row of the variants' table, and the route that feeds it.

    Args:
        variant: The row.
        source: The route.
        more: Further recipe keys.
    """

    variant: str
    source: str
    more: Settings = field(default_factory=dict)

    @property
    def settings(self) -> Settings:
        """All that it sets in a recipe."""
        return {"variant": self.variant, "proximal.source": self.source, **self.more}

    @property
    def has_band(self) -> bool:
        """Whether r_d is a ratio, so that the band acts."""
        return not find_variant(self.variant).r_d.is_one


METHODS: Final[Mapping[str, Method]] = MappingProxyType(
    {
        "exact": Method(variant="decoupled_exact", source="snapshot"),
        "dedicated": Method(variant="decoupled_exact", source="dedicated"),
        "interruption": Method(variant="decoupled_exact", source="interruption"),
        "eager": Method(variant="decoupled_exact", source="eager"),
        "arrival": Method(variant="decoupled_async", source="arrival"),
        "ewma": Method(variant="ppo_ewma_train_infer", source="ewma"),
        "ewma-auto": Method(variant="ppo_ewma_train_infer", source="ewma", more={"proximal.decay": "auto"}),
        "ewma-reset-paper": Method(variant="ppo_ewma_train_infer", source="ewma", more={"proximal.reset": "paper"}),
        "ewma-reset-guarded": Method(variant="ppo_ewma_train_infer", source="ewma", more={"proximal.reset": "guarded"}),
        "aged": Method(variant="aged_train_infer", source="aged"),
        "rescore": Method(variant="rescore_train_infer", source="rescore"),
        "linear": Method(variant="linear_prox", source="none"),
        "log-linear": Method(variant="loglinear_prox", source="none"),
        "mu": Method(variant="ppo_clip_train_infer", source="none"),
        "exact-r_d-1": Method(variant="ppo_clip", source="snapshot"),
        "mis-balance": Method(variant="mis_balance", source="balance"),
        "truncated-is": Method(variant="ppo_clip_train_infer", source="none", more={"objective.clip": "truncated"}),
        "synchronous": Method(variant="decoupled_exact", source="snapshot", more={"lockstep.max_lag": 0, "max_staleness": 0}),
    }
)
"""Method by name. The exact routes train alike and differ in cost; the last two are baselines: no clip, no staleness."""


def find_method(name: str) -> Method:
    """The method of that name; ``LOSS@METHOD`` is a built-in loss over the policies of that method.

    Raises:
        ConfigError: There is none.

    Example:
        >>> find_method("masked_is@arrival").settings
        {'variant': 'decoupled_async', 'proximal.source': 'arrival', 'objective.loss': 'masked_is'}
    """
    loss, _, base = name.rpartition("@")
    if base not in METHODS or (loss and loss not in LOSSES.names):
        allowed = f"{', '.join(METHODS)}; or LOSS@METHOD, LOSS one of {', '.join(LOSSES.names)}"
        raise ConfigError("unknown method", got=repr(name), allowed=allowed, fix="choose one of these")
    found = METHODS[base]
    return replace(found, more={**found.more, "objective.loss": loss}) if loss else found
