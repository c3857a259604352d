"""Decision error: how often each proximal policy lets another token into the update than OLD does, read from recorded traces.

What is compared: on the same tokens, with the same MU, THETA, advantages, band and clip, the active set of
``r_d = X/MU, r_s = THETA/X`` and that of ``r_d = OLD/MU, r_s = THETA/OLD``. The proximal policy X is the only difference; THETA
is that of the run that made the trace. For ``mu``, X = MU: no band acts, and the clip is on the total ratio. The
interpolations are judged in this form too (Proposition 1 speaks of it), not in the ``r_d = 1`` form of the paper's table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import pyarrow as pa
import torch
from torch import Tensor

from oldlogits.core.policies import MU, OLD, THETA, VARIANTS
from oldlogits.objective import DecisionSums, decision_sums, linear_logp, loglinear_logp, split_ratio, surrogate
from studies.old_logits.measure.trace import AVERAGES, TraceInfo

Columns = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecisionError:
    """What one proximal policy decides otherwise than OLD on one trace, under one band. ``R = theta / mu``.

    Shares by weight are ``sum |R A|`` over the differing tokens, divided by that over the tokens active under OLD; 0
    where those have no weight.

    Args:
        window: The largest lag of the trace, in versions.
        lag: How lags are spread over the window.
        engine: The engine's numerics.
        driver: The method that trained while the trace was recorded.
        trace: Number of the trace.
        seed: Of the run.
        band: The discrepancy band.
        proximal_policy: Its name, one of `PROXIMAL_POLICIES`.
        num_tokens: Loss tokens.
        num_nonzero: Those with A != 0.
        staleness: Mean over the loss tokens, in versions.
        beta: Of the average that the proximal policy takes part in, mean over the recorded updates; None: it has no average.
        log_error: Mean ``|log X - log OLD|``, nats.
        by_count: Share of the loss tokens whose decision differs; ``wrongly_kept + wrongly_masked``.
        by_weight: The same by weight; ``by_weight_kept + by_weight_masked``.
        wrongly_kept: Share of the loss tokens that are active under the proximal policy and not under OLD.
        wrongly_masked: Share of the loss tokens that are active under OLD and not under the proximal policy.
        wrongly_kept_nonzero: The same of the tokens with A != 0.
        wrongly_masked_nonzero: The same of the tokens with A != 0.
        by_weight_kept: The wrongly kept tokens by weight.
        by_weight_masked: The wrongly masked tokens by weight.
    """

    window: int
    lag: str
    engine: str
    driver: str
    trace: int
    seed: int
    band: float
    proximal_policy: str
    num_tokens: int
    num_nonzero: int
    staleness: float
    beta: float | None
    log_error: float
    by_count: float
    by_weight: float
    wrongly_kept: float
    wrongly_masked: float
    wrongly_kept_nonzero: float
    wrongly_masked_nonzero: float
    by_weight_kept: float
    by_weight_masked: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StandIn:
    """How a proximal policy's log-probs follow from a trace.

    Args:
        logp: From the columns of the trace and the weight on MU.
        average: The panel's average that it takes part in; empty: none.
    """

    logp: Callable[[Columns, float], Tensor]
    average: str = ""


def _recorded(column: str) -> Callable[[Columns, float], Tensor]:
    return lambda columns, weight_mu: columns[f"logp_{column}"]


PROXIMAL_POLICIES: Final[Mapping[str, StandIn]] = MappingProxyType(
    {
        "arrival": StandIn(logp=_recorded("async")),
        "linear": StandIn(logp=lambda c, weight_mu: linear_logp(c["logp_mu"], c["logp_theta"], weight_mu)),
        "log-linear": StandIn(logp=lambda c, weight_mu: loglinear_logp(c["logp_mu"], c["logp_theta"], weight_mu)),
        **{name: StandIn(logp=_recorded(name), average=name) for name in AVERAGES},
        "aged": StandIn(logp=_recorded("aged"), average="ewma"),
        "rescore": StandIn(logp=_recorded("rescore")),
        "mu": StandIn(logp=_recorded("mu")),
    }
)
"""Proximal policy by name."""


def decision_errors(
    table: pa.Table,
    *,
    driver: str,
    trace: int,
    bands: Sequence[float],
    eps_low: float,
    eps_high: float,
    dual_clip: float | None,
    weight_mu: float = 0.5,
) -> tuple[DecisionError, ...]:
    """The decision errors of every proximal policy on a trace, its further averages included, under every band.

    Args:
        table: Of `record_trace`.
        driver: The method that trained while it was recorded.
        trace: Its number.
        bands: Each > 1.
        eps_low: Of the clip.
        eps_high: Of the clip.
        dual_clip: Of the clip, > 1; None for none.
        weight_mu: The weight on MU of the two interpolations.

    Raises:
        ConfigError: A bound is out of range.
    """
    info = TraceInfo.of(table)
    others = {name: StandIn(logp=_recorded(name), average=name) for name in info.beta if name not in PROXIMAL_POLICIES}
    policies = {**PROXIMAL_POLICIES, **others}
    columns = {name: torch.from_numpy(table.column(name).to_numpy().copy()) for name in table.column_names}
    judge = _Judge(columns, eps_low=eps_low, eps_high=eps_high, dual_clip=dual_clip)
    num_tokens, num_nonzero = len(table), int(columns["advantage"].count_nonzero())
    staleness = float(columns["staleness"].double().mean())
    return tuple(
        DecisionError(
            window=info.window,
            lag=info.lag,
            engine=info.engine,
            driver=driver,
            trace=trace,
            seed=info.seed,
            band=band,
            proximal_policy=name,
            num_tokens=num_tokens,
            num_nonzero=num_nonzero,
            staleness=staleness,
            beta=info.beta.get(proximal_policy.average),
            **_shares(judge.sums(proximal_policy.logp(columns, weight_mu), band)),
        )
        for band in bands
        for name, proximal_policy in policies.items()
    )


class _Judge:
    """The tokens of one trace under one clip."""

    def __init__(self, columns: Columns, *, eps_low: float, eps_high: float, dual_clip: float | None) -> None:
        self._columns, self._eps_low, self._eps_high, self._dual_clip = columns, eps_low, eps_high, dual_clip
        self._all = torch.ones_like(columns["logp_mu"], dtype=torch.bool)

    def active(self, logp: Tensor, band: float) -> Tensor:
        """The tokens that are active with `logp` in the place of OLD."""
        c = self._columns
        return surrogate(
            split_ratio(VARIANTS["decoupled_exact"], {MU: c["logp_mu"], OLD: logp, THETA: c["logp_theta"]}),
            c["advantage"],
            self._all,
            band=band,
            eps_low=self._eps_low,
            eps_high=self._eps_high,
            dual_clip=self._dual_clip,
            discrepancy="weight_and_mask",
        ).active_mask

    def sums(self, logp: Tensor, band: float) -> DecisionSums:
        """Proximal policy against OLD, all lags in one."""
        c = self._columns
        return decision_sums(
            logp,
            c["logp_old"],
            c["logp_theta"] - c["logp_mu"],
            c["advantage"],
            active_mask=self.active(logp, band),
            exact_active_mask=self.active(c["logp_old"], band),
            loss_mask=self._all,
            staleness=torch.zeros_like(c["staleness"], dtype=torch.long),
            num_staleness=1,
        )


def _shares(sums: DecisionSums) -> dict[str, float]:
    def share(part: Tensor, of: Tensor) -> float:
        return float(part.sum() / of.sum()) if of.sum() else 0.0

    return {
        "log_error": share(sums.logp_error, sums.num_compared),
        "by_count": share(sums.wrongly_kept + sums.wrongly_masked, sums.num_tokens),
        "by_weight": share(sums.weight_wrongly_kept + sums.weight_wrongly_masked, sums.weight),
        "wrongly_kept": share(sums.wrongly_kept, sums.num_tokens),
        "wrongly_masked": share(sums.wrongly_masked, sums.num_tokens),
        "wrongly_kept_nonzero": share(sums.wrongly_kept_nonzero, sums.num_nonzero),
        "wrongly_masked_nonzero": share(sums.wrongly_masked_nonzero, sums.num_nonzero),
        "by_weight_kept": share(sums.weight_wrongly_kept, sums.weight),
        "by_weight_masked": share(sums.weight_wrongly_masked, sums.weight),
    }
