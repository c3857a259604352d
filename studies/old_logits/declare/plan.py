"""The recipe of a study, and the cells that it asks for.

[base] is a run recipe; a cell is that recipe under the settings of one regime and one method, with one seed. Cells are
named by what they compute: a cell that two views share is run once, and an interrupted study goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from oldlogits.config.check import check
from oldlogits.config.load import config_from_table, read_toml
from oldlogits.config.reader import build
from oldlogits.config.schema import RunConfig
from oldlogits.core.errors import ConfigError
from oldlogits.record.jsonl import Json, encode
from studies.old_logits.declare.methods import Settings, find_method
from studies.old_logits.results import VIEWS, Cross, Declaration, Knobs, Regime

Stage = Literal["pilot", "learning", "decision", "cost"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PilotPlan:
    """What chooses regimes, bands and clips, on seeds that no confirmation run uses."""

    seeds: tuple[int, ...] = ()
    """Of warm start and RL."""
    methods: tuple[str, ...] = ()
    """All under the same budget: every band of a method that has one, then every eps at its best band."""
    bands: tuple[float, ...] = ()
    """Bands that are tried."""
    eps: tuple[tuple[float, float], ...] = ()
    """Pairs of eps_low and eps_high that are tried beside those of the regime."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningPlan:
    """The confirmation runs."""

    regimes: tuple[str, ...] = ()
    """Names of the regimes that are declared; those that are exploratory run as well."""
    methods: tuple[str, ...] = ()
    """In the order of the tables."""
    contrasts: tuple[tuple[str, str], ...] = ()
    """Declared differences: first minus second."""
    num_blocks: int = 10
    """Blocks, each with its own warm start and RL seed, of the methods in the contrasts, at equal band."""
    num_exploratory_blocks: int = 4
    """Blocks of all other runs."""
    first_seed: int = 0
    """Of block 0; block i has the seed first_seed + i."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecisionPlan:
    """The recorded traces: every window x lag x engine, one trace for each driver; bands are read off a trace."""

    windows: tuple[int, ...] = ()
    lags: tuple[str, ...] = ()
    engines: tuple[str, ...] = ()
    bands: tuple[float, ...] = ()
    drivers: tuple[str, ...] = ()
    """The method that trains each trace."""
    num_updates_beyond_window: int = 6
    """A trace makes window + this many updates, so that its last batches hold tokens of every lag."""
    num_scored: int = 4
    """The last updates whose tokens are compared."""
    first_seed: int = 0
    """Of the first trace; trace i has the seed first_seed + i."""
    settings: Settings = field(default_factory=dict)
    """Recipe keys beside those of [base]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CostPlan:
    """The system cost of every route, in runtime "local", one run at a time."""

    recipe: str = "desk.toml"
    """A run recipe, relative to the recipe of the study."""
    routes: tuple[str, ...] = ()
    """Methods, by the routes that feed them."""
    settings: Settings = field(default_factory=dict)
    """Recipe keys beside those of the recipe."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The recipe of a study."""

    title: str
    """Of its tables and pages."""
    base: Mapping[str, object]
    """The run recipe of all cells but those of [cost]."""
    notes: str = ""
    """A text file of commentary, relative to the recipe."""
    processes: int = 2
    """Cells that run at the same time; those of [cost] run alone."""
    regimes: tuple[Regime, ...] = ()
    pilot: PilotPlan = field(default_factory=PilotPlan)
    learning: LearningPlan = field(default_factory=LearningPlan)
    decision: DecisionPlan = field(default_factory=DecisionPlan)
    cost: CostPlan = field(default_factory=CostPlan)
    folder: str = "."
    """Where paths begin; that of the recipe, which `read_plan` sets."""

    @property
    def declaration(self) -> Declaration:
        """What the study promises to show.

        Raises:
            ConfigError: It names a regime or a method that does not exist.
        """
        named = {regime.name: regime for regime in self.regimes}
        unknown = [name for name in self.learning.regimes if name not in named]
        if unknown:
            raise ConfigError("unknown regime", got=unknown[0], allowed=", ".join(named), fix="write its [[regimes]] table")
        chosen = [named[name] for name in self.learning.regimes]
        d, extra = self.decision, [regime for regime in self.regimes if regime.exploratory and regime not in chosen]
        return Declaration(
            regimes=(*chosen, *extra),
            methods=self.learning.methods,
            contrasts=self.learning.contrasts,
            num_blocks=self.learning.num_blocks,
            num_exploratory_blocks=self.learning.num_exploratory_blocks,
            cross=Cross(windows=d.windows, lags=d.lags, engines=d.engines, bands=d.bands, num_traces=len(d.drivers)),
            routes=self.cost.routes,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One job: a checked recipe, and what its result is filed under.

    Args:
        stage: What is measured.
        config: The recipe.
        regime: Name of the regime; empty for a trace or a cost.
        method: Name of the method.
        block: Number of the block or of the trace.
        bands: Those that are read off a trace.
        num_scored: The last updates of a trace whose tokens are compared.
    """

    stage: Stage
    config: RunConfig
    regime: str = ""
    method: str
    block: int = 0
    bands: tuple[float, ...] = ()
    num_scored: int = 0

    @property
    def key(self) -> str:
        """The hash of all that the result depends on but the code, and the defaults in it."""
        own = _unlike(asdict(self.config), asdict(RunConfig()))
        content = [self.stage, own, self.regime, self.method, self.block, self.bands, self.num_scored]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def label(self) -> str:
        """For a person who waits for it."""
        c = self.config
        words = [self.regime or f"{c.engine.precision} {c.lockstep.lag} W {c.window}", self.method, f"band {c.band:g}"]
        return f"{self.stage}: " + ", ".join([*words, f"seed {c.seed}"])


def read_plan(recipe: Path) -> Plan:
    """Read the recipe of a study, and check every cell in it.

    Raises:
        ConfigError: It does not exist, is no TOML, or asks for a run that cannot be.
    """
    plan = replace(build(Plan, read_toml(recipe)), folder=str(recipe.parent))
    list(cells(plan))
    return plan


def cells(plan: Plan) -> Iterator[Cell]:
    """All cells that can be named before a pilot has run: the pilot's bands, and the rest."""
    yield from pilot_bands(plan)
    yield from learning_cells(plan)
    yield from decision_cells(plan)
    yield from cost_cells(plan)


def pilot_bands(plan: Plan) -> Iterator[Cell]:
    """Every regime under every band, with the regime's own eps."""
    for regime in plan.regimes:
        if not regime.exploratory:
            for method in plan.pilot.methods:
                bands = plan.pilot.bands if find_method(method).has_band else (regime.band,)
                for band in bands:
                    yield from _pilot(plan, regime, method, (band, regime.eps_low, regime.eps_high))


def pilot_eps(plan: Plan, best_bands: Mapping[tuple[str, str], float]) -> Iterator[Cell]:
    """Every regime under every eps, at the best band of each (regime, method)."""
    for regime in plan.regimes:
        if not regime.exploratory:
            for method in plan.pilot.methods:
                for eps_low, eps_high in plan.pilot.eps:
                    yield from _pilot(plan, regime, method, (best_bands[regime.name, method], eps_low, eps_high))


def _pilot(plan: Plan, regime: Regime, method: str, knobs: Knobs) -> Iterator[Cell]:
    for block, seed in enumerate(plan.pilot.seeds):
        yield _cell(plan, "pilot", regime, method, knobs, block, seed)


def learning_cells(plan: Plan) -> Iterator[Cell]:
    """The confirmation runs; one that two views share comes once.

    Those of the declared contrasts come first, and block by block: what else the machine does meets all methods alike.
    """
    declaration = plan.declaration
    found: dict[str, Cell] = {}
    for view in VIEWS:
        for regime in declaration.regimes:
            for method in declaration.methods:
                knobs = regime.knobs(view, method)
                if knobs is None:
                    continue
                for block in range(declaration.blocks_of(regime, method, view)):
                    cell = _cell(plan, "learning", regime, method, knobs, block, plan.learning.first_seed + block)
                    found.setdefault(cell.key, cell)
    contrasted = {method for pair in declaration.contrasts for method in pair}
    exploratory = {regime.name for regime in declaration.regimes if regime.exploratory}
    order = {regime.name: i for i, regime in enumerate(declaration.regimes)}
    yield from sorted(
        found.values(),
        key=lambda cell: (cell.regime in exploratory, cell.method not in contrasted, order[cell.regime], cell.block),
    )


def decision_cells(plan: Plan) -> Iterator[Cell]:
    """The traces; the widest windows first, since they take longest."""
    d = plan.decision
    for window in sorted(d.windows, reverse=True):
        for trace, driver in enumerate(d.drivers):
            for lag in d.lags:
                for engine in d.engines:
                    settings: dict[str, object] = {
                        "lockstep.lag": lag,
                        "lockstep.max_lag": window,
                        "max_staleness": window,
                        "engine.precision": engine,
                        "num_updates": window + d.num_updates_beyond_window,
                        "audit.share": 1.0,
                        "seed": d.first_seed + trace,
                    }
                    config = _config(plan.base, [d.settings, find_method(driver).settings, settings])
                    yield Cell(
                        stage="decision",
                        config=config,
                        method=driver,
                        block=trace,
                        bands=d.bands,
                        num_scored=d.num_scored,
                    )


def cost_cells(plan: Plan) -> Iterator[Cell]:
    """One run in runtime "local" for every route."""
    for route in plan.cost.routes:
        config = _config(read_toml(Path(plan.folder) / plan.cost.recipe), [plan.cost.settings, find_method(route).settings])
        yield Cell(stage="cost", config=config, method=route)


def _cell(plan: Plan, stage: Stage, regime: Regime, method: str, knobs: Knobs, block: int, seed: int) -> Cell:
    band, eps_low, eps_high = knobs
    own: Settings = {"band": band, "objective.eps_low": eps_low, "objective.eps_high": eps_high, "seed": seed}
    config = _config(plan.base, [regime.settings, find_method(method).settings, own])
    return Cell(stage=stage, config=config, regime=regime.name, method=method, block=block)


def _config(base: Mapping[str, object], settings: Iterable[Mapping[str, object]]) -> RunConfig:
    """A checked run recipe: the base under dotted settings, the last one first."""
    table: dict[str, object] = json.loads(json.dumps(base))
    for one in settings:
        for key, value in one.items():
            *path, name = key.split(".")
            inner = table
            for part in path:
                inner = inner.setdefault(part, {})  # type: ignore[assignment]
            inner[name] = value
    config = config_from_table(table)
    check(config)
    return config


def _unlike(values: Mapping[str, object], defaults: Mapping[str, object]) -> dict[str, object]:
    """The values that are not the default, table by table."""
    found: dict[str, object] = {}
    for name, value in values.items():
        default = defaults[name]
        if isinstance(value, Mapping) and isinstance(default, Mapping):
            found[name] = _unlike(value, default)
        elif value != default:
            found[name] = value
    return found


def resolved(plan: Plan) -> Mapping[str, Json]:
    """The plan as ``study.json`` keeps it."""
    plain: dict[str, Json] = json.loads(encode(asdict(plan)))
    del plain["folder"]
    return plain
