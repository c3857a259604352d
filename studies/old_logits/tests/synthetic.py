"""A study with known effects: success of a run = base of its block + effect of its method in its regime."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

from studies.old_logits.measure.cost import RouteCost
from studies.old_logits.measure.decision import DecisionError
from studies.old_logits.results import Budget, Cross, Declaration, LearningRun, Point, Regime, Study

METHODS = ("exact", "arrival", "ewma", "ewma-reset-guarded", "linear", "mu")
CONTRASTS = (("exact", "ewma"), ("ewma", "arrival"), ("exact", "arrival"))
KNOBS = (1.1, 0.2, 0.28)
NOISE = (0.01, -0.02, 0.015, 0.0, -0.005, 0.02, -0.01, 0.005, -0.015, 0.0)
"""A block's own shift of a method, by block; the methods go through it from different starts."""

EFFECTS: Mapping[str, Mapping[str, float]] = {
    "tight": {"exact": 0.0, "ewma": -0.1, "arrival": -0.5, "ewma-reset-guarded": -0.11, "linear": 0.02, "mu": -0.02},
    "loose": dict.fromkeys(METHODS, 0.0),
}
CPU_S = {"exact": 30.0, "arrival": 24.0, "ewma": 27.0, "ewma-reset-guarded": 27.0, "linear": 20.0, "mu": 20.0}


def run(regime: str, method: str, block: int, success: float, *, cpu_s: float = 20.0, **changes: object) -> LearningRun:
    """A run whose curve rises evenly over three evaluations, from 0.2."""
    curve = tuple(
        Point(update=30 * index, cpu_s=cpu_s * index / 2, success=0.2 + (success - 0.2) * index / 2) for index in range(3)
    )
    band, eps_low, eps_high = KNOBS
    fields = {
        "regime": regime, "method": method, "block": block, "seed": 100 + block, "band": band, "eps_low": eps_low,
        "eps_high": eps_high, "success": success, "num_episodes": 512, "num_updates": 60, "rho": 0.9, "cpu_s": cpu_s,
        "num_resets": 0, "curve": curve,
    }  # fmt: skip
    return LearningRun(**(fields | changes))


def noise(method: str, block: int) -> float:
    return NOISE[(block + 3 * METHODS.index(method)) % len(NOISE)]


def success_of(regime: str, method: str, block: int) -> float:
    return 0.8 + 0.004 * block + EFFECTS[regime][method] + noise(method, block)


def regime(name: str, **changes: object) -> Regime:
    band, eps_low, eps_high = KNOBS
    settings = {"engine.precision": "fp8", "lockstep.max_lag": 16}
    return Regime(**({"name": name, "settings": settings, "band": band, "eps_low": eps_low, "eps_high": eps_high} | changes))


def declaration(*regimes: Regime, num_blocks: int = 10) -> Declaration:
    return Declaration(
        regimes=regimes or (regime("tight", tuned={"exact": (1.5, 0.2, 0.28), "ewma": (1.1, 0.2, 0.28)}), regime("loose")),
        methods=METHODS,
        contrasts=CONTRASTS,
        num_blocks=num_blocks,
        num_exploratory_blocks=5,
        cross=Cross(windows=(4, 16), lags=("even",), engines=("fp8",), bands=(1.1, 1.5), num_traces=5),
        routes=("exact", "arrival", "ewma", "mu"),
    )


def learning_runs(declared: Declaration) -> tuple[LearningRun, ...]:
    """Every declared run at equal band; the guarded reset fires in block 0 and 1 of each regime."""
    return tuple(
        run(
            place.name,
            method,
            block,
            success_of(place.name, method, block),
            cpu_s=CPU_S[method],
            num_resets=int(method == "ewma-reset-guarded" and block < 2),
        )
        for place in declared.regimes
        for method in METHODS
        for block in range(declared.blocks_of(place, method, "band"))
    )


ERRORS = {
    "arrival": 0.05, "linear": 0.03, "log-linear": 0.045, "ewma": 0.04, "ewma-mean-lag": 0.041, "ewma-auto": 0.039,
    "aged": 0.035, "rescore": 0.018, "mu": 0.016,
}  # fmt: skip
"""Decision error of a proximal policy at window 4, band 1.1; twice that at window 16, half of it at band 1.5."""

TRACE_NOISE = (0.9, 1.0, 1.1, 1.05, 0.95)


def error_of(proximal_policy: str, window: int, band: float, trace: int) -> float:
    own = TRACE_NOISE[(trace + len(proximal_policy)) % 5]
    return ERRORS[proximal_policy] * (2.0 if window == 16 else 1.0) * (0.5 if band == 1.5 else 1.0) * own


def decision_rows() -> tuple[DecisionError, ...]:
    """Every declared cell: errors by count as above, by weight half of them, a quarter of it kept wrongly."""
    rows = []
    for window, band, trace, proximal_policy in product((4, 16), (1.1, 1.5), range(5), ERRORS):
        error = error_of(proximal_policy, window, band, trace)
        shares = {"by_count": error, "wrongly_kept": error / 4, "wrongly_masked": 3 * error / 4, "by_weight": error / 2}
        shares |= {"wrongly_kept_nonzero": error / 4, "wrongly_masked_nonzero": 3 * error / 4}
        shares |= {"by_weight_kept": error / 8, "by_weight_masked": 3 * error / 8}
        rows.append(
            DecisionError(
                window=window, lag="even", engine="fp8", driver="exact", trace=trace, seed=trace, band=band,
                proximal_policy=proximal_policy, num_tokens=10_000, num_nonzero=10_000, staleness=window / 2,
                beta=window / (window + 2) if "ewma" in proximal_policy else None, log_error=error, **shares,
            )
        )  # fmt: skip
    return tuple(rows)


EXTRA_S = {"snapshot": 0.2, "arrival": 0.08, "ewma": 0.1, "none": 0.0}


def route_costs() -> tuple[RouteCost, ...]:
    """The declared routes, and `none`."""
    return tuple(
        RouteCost(
            route=route, num_updates=10, weights_bytes=1_000_000, stored_bytes=5_000_000, resident_copies=6.0,
            num_switches=2.0, switch_s=0.001 if extra_s else None, forwards=1.5, score_s=extra_s, wait_s=extra_s, keep_s=0.0,
            extra_s=extra_s, stall_s=0.02, hidden_share=0.25 if extra_s else None, update_s=2.0, trajectories_per_s=80.0,
        )
        for route, extra_s in EXTRA_S.items()
    )  # fmt: skip


def study(**changes: object) -> Study:
    declared = declaration()
    fields = {
        "title": "A study of known effects", "notes": "", "recipe": {"base": {"num_updates": 60}}, "declaration": declared,
        "code": {"version": "0.1.0", "commit": "abc"}, "machine": {"platform": "x", "num_cpus": 2}, "pilot": (),
        "learning": learning_runs(declared), "decision": decision_rows(), "cost": route_costs(),
        "budget": Budget(cpu_s=7200.0, wall_s=3700.0),
    }  # fmt: skip
    return Study(**(fields | changes))
