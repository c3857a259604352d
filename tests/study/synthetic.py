"""A study with known effects: success of a run = base of its block + effect of its method in its regime."""

from __future__ import annotations

from collections.abc import Mapping

from oldlogits.study.results import Budget, Cross, Declaration, LearningRun, Point, Regime, Study

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
    settings = {"engine.numerics": "fp8", "runtime.window": 16}
    return Regime(**({"name": name, "settings": settings, "band": band, "eps_low": eps_low, "eps_high": eps_high} | changes))


def declaration(*regimes: Regime, num_blocks: int = 10) -> Declaration:
    return Declaration(
        regimes=regimes or (regime("tight", tuned={"exact": (1.5, 0.2, 0.28), "ewma": (1.1, 0.2, 0.28)}), regime("loose")),
        methods=METHODS,
        contrasts=CONTRASTS,
        num_blocks=num_blocks,
        num_exploratory_blocks=5,
        cross=Cross(windows=(4, 16), lags=("even",), engines=("fp8",), bands=(1.1, 1.5), num_traces=5),
        routes=("snapshot", "arrival", "ewma"),
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
        for block in range(declared.blocks_of(place, method))
    )


def study(**changes: object) -> Study:
    declared = declaration()
    fields = {
        "title": "A study of known effects", "notes": "", "recipe": {"base": {"num_updates": 60}}, "declaration": declared,
        "code": {"version": "0.1.0", "commit": "abc"}, "machine": {"platform": "x", "num_cpus": 2}, "pilot": (),
        "learning": learning_runs(declared), "decision": (), "cost": (), "budget": Budget(cpu_s=7200.0, wall_s=3700.0),
    }  # fmt: skip
    return Study(**(fields | changes))
