"""What the cells of a study measured, as data: the content of ``study.json``."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, asdict, astuple, dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Final, Literal, Self, TypeVar, cast

from oldlogits.core.errors import ConfigError
from oldlogits.record.folder import write_atomic
from oldlogits.record.jsonl import Json, RecordError, encode, revived
from studies.old_logits.declare.methods import Settings, find_method
from studies.old_logits.measure.cost import RouteCost
from studies.old_logits.measure.decision import DecisionError

T = TypeVar("T")

Plain = Mapping[str, Json]
"""What a file holds, unread."""

Knobs = tuple[float, float, float]
"""Band, eps_low, eps_high."""

View = Literal["band", "rho", "tuned"]
"""How methods are made comparable: at equal band and eps, at equal rho, or each with the best that the pilot found."""

VIEWS: Final[tuple[View, ...]] = ("band", "rho", "tuned")


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One evaluation during a run.

    Args:
        update: Versions made by then.
        cpu_s: CPU seconds of training by then: sampling, scoring and steps, without evaluation.
        success: Held-out success of sampled episodes.
    """

    update: int
    cpu_s: float
    success: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Checks:
    """Whether a run does what it is said to do (`measure.idle`).

    Args:
        clipped: The largest share of an update's loss tokens that the clip left out.
        masked: The largest share that r_d left out.
        first_batch: A digest of the tokens of its first batch.
        num_retrained: Groups that were trained in more than one update.
        loss_error: The largest difference of the loss of an update from that formed again of its record, with the denominator
            that the recipe states.
    """

    clipped: float
    masked: float
    first_batch: str
    num_retrained: int
    loss_error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningRun:
    """One training run of the learning study.

    Args:
        regime: Name of the regime.
        method: Name of the method.
        block: Number of the block: runs of one block share the warm start and the RL seed.
        seed: Of warm start and RL.
        band: The band; of no effect where the method has none.
        eps_low: Of the clip.
        eps_high: Of the clip.
        success: Final held-out success of sampled episodes.
        num_episodes: That it is the mean of.
        num_updates: Versions made.
        rho: Mean over updates of the share of tokens left active.
        cpu_s: CPU seconds of training: sampling, scoring and steps, without evaluation.
        num_resets: Resets of the weight average.
        curve: Evaluations during the run, ascending; the last is the final one.
        error: Why the run ended early; empty: it did not. Its success then counts as that of its last evaluation.
        checks: Those of a study that records the tokens of every update; None: it does not.
    """

    regime: str
    method: str
    block: int
    seed: int
    band: float
    eps_low: float
    eps_high: float
    success: float
    num_episodes: int
    num_updates: int
    rho: float
    cpu_s: float
    num_resets: int
    curve: tuple[Point, ...]
    error: str = ""
    checks: Checks | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Regime:
    """A setting that methods are compared in.

    Args:
        name: In every table.
        settings: Recipe keys that it sets, beside the base recipe.
        band: The band of all methods at equal band.
        eps_low: Of the clip, at equal band and at equal rho.
        eps_high: Of the clip, at equal band and at equal rho.
        eps: By loss, eps_low and eps_high of one whose clip is of another size: that of a sequence is far below a token's.
        rho_bands: The band at which a method has the rho that all shall have; methods without a band need none.
        rho_unreached: Methods that no piloted band brings to that rho: they are not in that view, nor their contrasts.
        tuned: What the pilot found best, by method.
        methods: Those that run in it; empty: all.
        exploratory: Outside the declared tests.
    """

    name: str
    settings: Settings
    band: float
    eps_low: float
    eps_high: float
    rho_bands: Mapping[str, float] = field(default_factory=dict)
    rho_unreached: tuple[str, ...] = ()
    tuned: Mapping[str, Knobs] = field(default_factory=dict)
    methods: tuple[str, ...] = ()
    exploratory: bool = False
    eps: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def views(self) -> tuple[View, ...]:
        """The views that are declared for it."""
        declared = {"band": True, "rho": bool(self.rho_bands), "tuned": bool(self.tuned)}
        return tuple(view for view in VIEWS if declared[view])

    def knobs(self, view: View, method: str) -> Knobs | None:
        """What a method runs with in a view; None where the view does not hold the method."""
        if self.methods and method not in self.methods:
            return None
        if view == "tuned":
            return self.tuned.get(method)
        band = self.band if view == "band" or not find_method(method).has_band else self.rho_bands.get(method)
        loss, _, _ = method.rpartition("@")
        return None if band is None else (band, *self.eps.get(loss, (self.eps_low, self.eps_high)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Cross:
    """The declared cross of the decision errors: every window x lag shape x engine x band, over `num_traces` traces each."""

    windows: tuple[int, ...] = ()
    lags: tuple[str, ...] = ()
    engines: tuple[str, ...] = ()
    bands: tuple[float, ...] = ()
    num_traces: int = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Declaration:
    """What a study promises to show, written down before its confirmation runs.

    Args:
        regimes: In the order of the tables.
        methods: In the order of the tables.
        contrasts: Pairs (first, second); the difference is first - second.
        num_blocks: Of the methods in the contrasts in the primary view, in the regimes that are not exploratory.
        num_exploratory_blocks: Of all other runs.
        primary: The view whose contrasts are the declared tests.
        cross: Of the decision errors.
        routes: Whose cost is measured.

    Raises:
        ConfigError: A method is unknown, a contrast names one that is not compared, or the primary view is not declared.
    """

    regimes: tuple[Regime, ...]
    methods: tuple[str, ...]
    contrasts: tuple[tuple[str, str], ...]
    num_blocks: int
    num_exploratory_blocks: int
    primary: View = "band"
    cross: Cross = field(default_factory=Cross)
    routes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what the study does not compare."""
        for method in self.methods:
            find_method(method)
        unknown = sorted({method for pair in self.contrasts for method in pair} - set(self.methods))
        if unknown:
            raise ConfigError(
                "a contrast of methods that the study does not run",
                got=", ".join(unknown),
                allowed=", ".join(self.methods),
                fix="add them to the methods",
            )
        without = [regime.name for regime in self.regimes if self.primary not in regime.views]
        if without:
            raise ConfigError(
                "regimes without the primary view",
                got=f"{self.primary} in {', '.join(without)}",
                allowed="knobs for it in every regime",
                fix="declare them, or choose another primary view",
            )

    def blocks_of(self, regime: Regime, method: str, view: View) -> int:
        """How many blocks a method is to be run in for a view."""
        declared = view == self.primary and not regime.exploratory and any(method in pair for pair in self.contrasts)
        return self.num_blocks if declared else self.num_exploratory_blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What a study took: CPU seconds over all its processes, and seconds from beginning to end."""

    cpu_s: float
    wall_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """The content of ``study.json``: all that tables, page and document are computed from.

    Args:
        title: The study's.
        notes: Commentary of a person; shown apart from what is computed.
        recipe: As resolved.
        declaration: What had to be shown.
        amendments: What of it the confirmation runs did not have before them, one sentence each.
        code: Version and commit.
        machine: Platform, CPU count, torch, Python.
        pilot: Runs that the regimes and the knobs were chosen by.
        learning: Runs that confirm.
        decision: Decision errors on recorded traces.
        cost: System cost by route.
        budget: What it took.
    """

    title: str
    notes: str
    recipe: Mapping[str, Json]
    declaration: Declaration
    code: Mapping[str, str]
    machine: Mapping[str, Json]
    pilot: tuple[LearningRun, ...]
    learning: tuple[LearningRun, ...]
    decision: tuple[DecisionError, ...]
    cost: tuple[RouteCost, ...]
    budget: Budget
    amendments: tuple[str, ...] = ()

    def write(self, path: Path) -> None:
        """Write ``study.json`` atomically, one row a line; non-finite numbers become strings.

        Decision errors are many: their names stand once, above the rows.
        """
        plain = {name: value for name, value in asdict(self).items() if name != "decision"}
        names = [field.name for field in fields(DecisionError)]
        plain["decision"] = [names, *map(astuple, self.decision)]
        lines = []
        for name, value in plain.items():
            is_rows = isinstance(value, list | tuple) and value
            text = "[\n" + ",\n".join(map(encode, value)) + "\n]" if is_rows else encode(value)
            lines.append(f"{encode(name)}: {text}")
        write_atomic(path, "{\n" + ",\n".join(lines) + "\n}\n")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read ``study.json``.

        Raises:
            RecordError: Its shape is not that of a study.
        """
        plain = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(plain, dict) and isinstance(plain.get("decision"), list):
            names, *rows = plain["decision"]
            plain["decision"] = [dict(zip(names, row, strict=True)) for row in rows]
        return read_as(cls, plain)


def read_as(kind: type[T], value: Json) -> T:
    """A value of a dataclass from what ``encode(asdict(value))`` wrote.

    Raises:
        RecordError: A key is missing or unknown, or a value has another type.
    """
    return cast(T, _read(kind, value, kind.__name__))


@cache
def _hints(kind: type) -> Mapping[str, object]:
    return typing.get_type_hints(kind)


def _read(kind: object, value: Json, where: str) -> object:
    if isinstance(kind, typing.ForwardRef):  # the inside of Json
        return value
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(kind, type) and is_dataclass(kind) and isinstance(value, Mapping):
        hints = _hints(kind)
        later = {one.name for one in fields(kind) if one.default is not MISSING} - value.keys()  # than the file was written
        if hints.keys() - later != value.keys():
            raise _misfit(where, f"keys {', '.join(value)}", ", ".join(hints))
        return kind(**{name: _read(hints[name], value[name], f"{where}.{name}") for name in hints if name not in later})
    if origin is tuple and isinstance(value, Sequence) and not isinstance(value, str):
        kinds = arguments[:1] * len(value) if arguments[-1] is ... else arguments
        if len(kinds) == len(value):
            return tuple(_read(item, part, f"{where}[]") for item, part in zip(kinds, value, strict=True))
    if origin is Mapping and isinstance(value, Mapping):
        return {key: _read(arguments[1], part, f"{where}.{key}") for key, part in value.items()}
    if origin is Sequence and isinstance(value, list):
        return [_read(arguments[0], part, f"{where}[]") for part in value]
    if origin is Literal and value in arguments:
        return value
    if kind is float and isinstance(found := revived(value), int | float) and not isinstance(found, bool):
        return float(found)
    if kind in (str, int, bool, types.NoneType) and type(value) is kind:
        return value
    if origin in (types.UnionType, typing.Union):
        for member in arguments:
            with suppress(RecordError):
                return _read(member, value, where)
    raise _misfit(where, repr(value)[:80], str(kind))


def _misfit(where: str, got: str, allowed: str) -> RecordError:
    return RecordError(f"{where} has another shape", got=got, allowed=allowed, fix="read it with the version that wrote it")
