"""What the masks and ratios did in one update, over all loss tokens and by staleness. See docs/metrics.md.

`diagnose` stays on the device; `to_metrics` waits for it, once per update.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from oldlogits.core.objective.shapes import Bool, Float, Int
from oldlogits.objective.masks import finite_mask

QUANTILES: Final = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
"""The quantiles of both log-ratios, linearly interpolated."""


@torch.no_grad()
def diagnose(
    log_r_d: Float[Tensor, " token"],
    log_r_s: Float[Tensor, " token"],
    *,
    band_mask: Bool[Tensor, " token"],
    clip_mask: Bool[Tensor, " token"],
    loss_mask: Bool[Tensor, " token"],
    staleness: Int[Tensor, " token"],
    advantages: Float[Tensor, " token"],
    num_staleness: int,
) -> Mapping[str, Float[Tensor, " group"] | Int[Tensor, " group"]]:
    """Diagnose one update from its ratios and the masks of its surrogate: ``area/name`` to its value in each group.

    The first group is that of all loss tokens, group 1 + s that of the loss tokens of staleness s. Ratios count finite tokens
    only; their figures are float64, NaN where there is none. "prox" in a name is the variant's proximal policy, whichever that
    is; where the variant has ``r_d = 1`` the figures of ``log r_d`` are 0.

    Args:
        log_r_d: The log of the discrepancy ratio.
        log_r_s: The log of the staleness ratio.
        band_mask: `LossTerms.band_mask`.
        clip_mask: `LossTerms.clip_mask`.
        loss_mask: Sampled tokens.
        staleness: Trainer version minus behaviour version; any value outside `loss_mask`.
        advantages: The sign tells which clip bound a token met.
        num_staleness: Staleness 0 .. num_staleness - 1 is told apart; older tokens are in `overall` only.

    Example:
        Two loss tokens with r_d = 1.25 and 0.8: ``kl_mu_prox_k1 = 0``, ``kl_mu_prox_k3 = (0.25 - 0.2) / 2 = 0.025``.
    """
    finite = loss_mask & finite_mask(log_r_d, log_r_s, advantages)
    tokens = (log_r_d.double(), log_r_s.double(), band_mask, clip_mask, loss_mask, finite, advantages)
    told_apart = (staleness >= 0) & (staleness < num_staleness)
    everything = _Groups(index=torch.zeros_like(staleness), num_groups=1)
    by_staleness = _Groups(index=torch.where(told_apart, staleness, num_staleness), num_groups=num_staleness)
    overall, apart = _statistics(everything, *tokens), _statistics(by_staleness, *tokens)
    return {name: torch.cat([overall[name], apart[name]]) for name in overall}


def to_metrics(diagnostics: Mapping[str, Float[Tensor, " group"] | Int[Tensor, " group"]]) -> dict[str, float]:
    """Give ``area/name`` to number, staleness s as ``area/name@lag{s}``; waits for the device.

    A group without loss tokens has no metrics, and a statistic without a finite token is left out.
    """
    columns = {name: values.tolist() for name, values in diagnostics.items()}
    return {
        name + (f"@lag{group - 1}" if group else ""): float(values[group])
        for group, num_tokens in enumerate(columns["mask/num_tokens"])
        for name, values in columns.items()
        if num_tokens and not math.isnan(values[group])
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Groups:
    """Reductions over the tokens of each group, without a data-dependent shape.

    Args:
        index: The group of each token; tokens of group `num_groups` belong nowhere.
        num_groups: Rows of every result.
    """

    index: Int[Tensor, " token"]
    num_groups: int

    def only(self, mask: Tensor) -> _Groups:
        """Give the same groups of the tokens in `mask`."""
        return _Groups(index=torch.where(mask, self.index, self.num_groups), num_groups=self.num_groups)

    def sum(self, values: Tensor) -> Tensor:
        """Sum over each group; bools are counted."""
        values = values.long() if values.dtype is torch.bool else values
        return values.new_zeros(self.num_groups + 1).index_add(0, self.index, values)[:-1]

    def mean(self, values: Tensor) -> Tensor:
        """Average over each group; NaN in an empty one."""
        return self.sum(values) / self.sum(torch.ones_like(self.index))

    def max(self, values: Tensor) -> Tensor:
        """Give the largest of each group; NaN in an empty one."""
        empty = values.new_full((self.num_groups + 1,), math.nan)
        return empty.scatter_reduce(0, self.index, values, "amax", include_self=False)[:-1]

    def quantiles(self, values: Tensor) -> Tensor:
        """Give ``[group quantile]``, linearly interpolated; NaN in an empty group."""
        by_value = values.argsort()
        ordered = values[by_value[self.index[by_value].argsort(stable=True)]]
        ordered = torch.cat([ordered, ordered.new_full((1,), math.nan)])
        size = self.sum(torch.ones_like(self.index))
        start = (size.cumsum(0) - size)[:, None]
        position = (size - 1).clamp(min=0)[:, None] * values.new_tensor(QUANTILES)
        low, high = ordered[start + position.floor().long()], ordered[start + position.ceil().long()]
        return torch.where(size[:, None] > 0, torch.lerp(low, high, position.frac()), math.nan)


def _statistics(
    groups: _Groups,
    log_r_d: Tensor,
    log_r_s: Tensor,
    band_mask: Tensor,
    clip_mask: Tensor,
    loss_mask: Tensor,
    finite: Tensor,
    advantages: Tensor,
) -> dict[str, Tensor]:
    """Give every statistic by its metric's name, [group]; docs/metrics.md has the formulas."""
    loss, of_finite = groups.only(loss_mask), groups.only(finite)
    clipped = finite & ~clip_mask
    log_total = log_r_d + log_r_s
    log_largest = of_finite.max(log_total)
    # The effective sample size does not change when all weights are divided by the largest.
    weight = (log_total - torch.cat([log_largest, log_largest.new_zeros(1)])[of_finite.index]).exp()
    found = {
        "mask/num_tokens": loss.sum(loss_mask),
        "mask/num_nonfinite": loss.sum(~finite),
        "mask/num_clipped_high": loss.sum(clipped & (advantages > 0)),
        "mask/num_clipped_low": loss.sum(clipped & (advantages < 0) & (log_r_s < 0)),
        "mask/num_clipped_dual": loss.sum(clipped & (advantages < 0) & (log_r_s > 0)),
        "mask/rho_band": loss.mean((band_mask & finite).double()),
        "mask/rho_clip": loss.mean((clip_mask & finite).double()),
        "mask/rho": loss.mean((band_mask & clip_mask & finite).double()),
        "ratio/ess": of_finite.mean(weight).square() / of_finite.mean(weight.square()),
        "kl/mu_prox_k1": of_finite.mean(-log_r_d),
        "kl/mu_prox_k3": of_finite.mean(log_r_d.expm1() - log_r_d),
        "kl/prox_theta_k3": of_finite.mean(log_r_d.exp() * (log_r_s.expm1() - log_r_s)),
        "ratio/log_r_d_abs_mean": of_finite.mean(log_r_d.abs()),
        "ratio/log_r_d_abs_max": of_finite.max(log_r_d.abs()),
        "ratio/log_r_s_abs_mean": of_finite.mean(log_r_s.abs()),
    }
    for name, log_ratio in (("log_r_d", log_r_d), ("log_r_s", log_r_s)):
        quantiles = of_finite.quantiles(log_ratio).unbind(1)
        found |= {f"ratio/{name}_q{round(100 * q):02d}": column for q, column in zip(QUANTILES, quantiles, strict=True)}
    return found
