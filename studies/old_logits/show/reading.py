"""The plain reading of a study: sentences that its figures choose. None of them is written before the figures are known."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from studies.old_logits.analyse.contrasts import (
    RESET_BAR,
    Contrast,
    MethodRow,
    all_contrasts,
    estimated,
    method_rows,
    reset_effect,
)
from studies.old_logits.analyse.pooling import declared_checks
from studies.old_logits.analyse.stats import Estimate, geometric_mean
from studies.old_logits.layout import counted, interval, p_value
from studies.old_logits.measure.decision import DecisionError
from studies.old_logits.results import Study
from studies.old_logits.show.cost_tables import NOISE, ROUTES, choices
from studies.old_logits.show.decision_tables import STAGE, Level, levels
from studies.old_logits.show.learning_tables import RESET_RULES, VIEW_NAMES

PAPER_ORDER: Final = ("exact", "ewma", "arrival")
"""Best first, as the paper reports it."""

_FACTOR_NAMES: Final = {"window": "the window", "lags": "the lag shape", "engine": "the engine", "band": "the band"}

_NOTHING: Final = 1.05
"""A factor that moves a value by less is said to leave it as it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A heading, and what the figures say under it."""

    heading: str
    sentences: tuple[str, ...]


def plain_reading(study: Study) -> tuple[Section, ...]:
    """What reproduces, what does not, what decides; sections without figures are left out."""
    contrasts = all_contrasts(study.declaration, study.learning)
    sections = {
        "The declared tests": _tests(contrasts),
        "The paper's order": _order(contrasts),
        "Equal rho, tuned, equal CPU seconds": _other_views(contrasts),
        "Collapses, and methods outside of the contrasts": _methods(study),
        "Resets": _resets(study),
        "Decision error": _decisions(study),
        "What decides": _what_decides(study.decision),
        "Which route": _routes(study),
    }
    found = [Section(heading=heading, sentences=tuple(sentences)) for heading, sentences in sections.items()]
    return tuple(section for section in found if section.sentences)


def _tests(contrasts: Sequence[Contrast]) -> Iterator[str]:
    for contrast in contrasts:
        if contrast.adjusted is not None:
            yield sentence(contrast)


def sentence(contrast: Contrast) -> str:
    """One contrast in words, judged by its interval and, where it is a declared test, by Holm's p."""
    found, first, second = contrast.estimate, contrast.first, contrast.second
    if found is None:
        return f"{contrast.regime}: {first} and {second} have no block in common; the comparison is missing."
    figures = f"{interval(found)}, {counted(found.n, 'block')}"
    if found.n < contrast.num_declared:
        figures += f" of {contrast.num_declared}"
    if found.n < 2:
        return f"{contrast.regime}: {first} - {second} is {found.mean:+.3f} in one block, which shows nothing."
    if found.sign == 0:
        widest = max(abs(found.low), abs(found.high))
        return (
            f"{contrast.regime}: no difference between {first} and {second} is shown ({figures}: the interval holds 0; "
            f"differences beyond {widest:.3f} are ruled out)."
        )
    better, worse = (first, second) if found.sign > 0 else (second, first)
    if contrast.adjusted is None:
        return f"{contrast.regime}: {better} ends above {worse} ({first} - {second} {figures}; exploratory)."
    if contrast.adjusted < 0.05:
        return f"{contrast.regime}: {better} beats {worse} ({first} - {second} {figures}, Holm p {p_value(contrast.adjusted)})."
    return (
        f"{contrast.regime}: {better} is ahead of {worse} ({first} - {second} {figures}), but not after Holm's adjustment "
        f"(p {p_value(contrast.adjusted)})."
    )


def _order(contrasts: Sequence[Contrast]) -> Iterator[str]:
    """How often the order that the paper reports is shown, reversed, neither, or has fewer than two blocks to tell by."""
    tests = [c for c in contrasts if c.adjusted is not None and {c.first, c.second} <= set(PAPER_ORDER)]
    if not tests:
        return
    missing = [c for c in tests if not _told(c)]
    signs = [(c, _as_reported(c)) for c in tests if _told(c)]
    shown, reversed_, rest = ([c for c, sign in signs if sign == wanted] for wanted in (1, -1, 0))
    yield (
        f"The paper reports {' above '.join(PAPER_ORDER)}. Of {counted(len(tests), 'declared test')}, {len(shown)} "
        f"{_verb('show', len(shown))} this order, {len(reversed_)} {_verb('show', len(reversed_))} the reverse, {len(rest)} "
        f"neither{f', {len(missing)} missing' if missing else ''}."
    )
    groups = {"It reproduces": shown, "It is reversed": reversed_, "Not shown either way": rest, "Missing": missing}
    for name, found in groups.items():
        if found:
            yield f"{name}: {'; '.join(f'{c.first} - {c.second} in {c.regime}' for c in found)}."


def _told(contrast: Contrast | None) -> Estimate | None:
    """What a contrast shows; None with fewer than two blocks."""
    return contrast.estimate if contrast and contrast.estimate and contrast.estimate.n > 1 else None


def _verb(verb: str, count: int) -> str:
    return verb + "s" if count == 1 else verb


def _as_reported(contrast: Contrast) -> int:
    """1: the paper's order, after Holm; -1: its reverse; 0: neither."""
    found = contrast.estimate
    if found is None or contrast.adjusted is None or contrast.adjusted >= 0.05:
        return 0
    rank = PAPER_ORDER.index
    return found.sign if rank(contrast.first) < rank(contrast.second) else -found.sign


def _other_views(contrasts: Sequence[Contrast]) -> Iterator[str]:
    """Where another view or axis says otherwise than the declared test of the same pair."""
    tests = {(c.regime, c.first, c.second): c for c in contrasts if c.adjusted is not None}
    axes = {"update": "", "cpu_s": " at equal CPU seconds"}
    compared = other = 0
    for contrast in contrasts:
        test = tests.get((contrast.regime, contrast.first, contrast.second))
        found, declared = _told(contrast), _told(test)
        if contrast is test or found is None or declared is None:
            continue
        compared += 1
        if found.sign != declared.sign:
            other += 1
            place = f"{contrast.regime}, {VIEW_NAMES[contrast.view]}{axes[contrast.axis]}"
            pair = f"{contrast.first} - {contrast.second}"
            yield (
                f"{place}: {pair} is {interval(found)} ({_word(found)}), against {interval(declared)} ({_word(declared)}) in "
                "the declared test."
            )
    if compared > other:
        yield f"{compared - other} of {counted(compared, 'exploratory comparison')} read as the declared test of the same pair."


def _word(estimate: Estimate) -> str:
    return {1: "above 0", 0: "holds 0", -1: "below 0"}[estimate.sign]


def _methods(study: Study) -> Iterator[str]:
    declaration = study.declaration
    reference = next(iter(declaration.methods), "")
    for regime in declaration.regimes:
        rows = method_rows(declaration, study.learning, regime, declaration.primary)
        if not any(row.runs for row in rows):
            continue
        yield f"{regime.name}: {_collapses(rows)}."
        others = [(row.method, found) for row in rows if row.method != reference and (found := estimated(row.differences))]
        for word, sign in (("above", 1), ("below", -1)):
            parted = [f"{method} {interval(found)}" for method, found in others if found.sign == sign]
            if parted:
                yield f"{regime.name}, {word} {reference} (intervals without 0, not adjusted): {', '.join(parted)}."


def _collapses(rows: Sequence[MethodRow]) -> str:
    found = [f"{row.method} in {row.num_collapses} of {counted(len(row.runs), 'run')}" for row in rows if row.num_collapses]
    return f"collapses: {', '.join(found)}" if found else f"no run of {sum(len(row.runs) for row in rows)} collapsed"


def _resets(study: Study) -> Iterator[str]:
    for rule in RESET_RULES:
        if rule not in study.declaration.methods:
            continue
        effect = reset_effect(study.declaration, study.learning, method=rule)
        if effect is None:
            yield f"{rule}: it fired in no run that can be compared, so nothing is known of its effect."
            continue
        regime, block, worst = effect.worst
        where = counted(len({cell[0] for cell in effect.cells}), "regime")
        yield (
            f"{rule}: it fired in {counted(len(effect.cells), 'run')} of {where}; against the same run without resets "
            f"{interval(effect.estimate)} over {counted(effect.estimate.n, 'block')}; worst: {regime}, block {block}, "
            f"{worst:+.3f}."
        )
        if rule == RESET_RULES[0]:
            yield (
                f"Its lower end is above {RESET_BAR:g}: the rule may be a default."
                if effect.holds
                else f"Its lower end is not above {RESET_BAR:g}: no reset rule is a default."
            )


def _decisions(study: Study) -> Iterator[str]:
    if not study.decision:
        return
    for check in declared_checks(study.decision, study.declaration.cross):
        if check.value is None:
            yield f"{check.claim}: no trace says anything about it."
            continue
        found = interval(check.ratio, ".3f") if check.ratio else f"{check.value:.3f}"
        verdict = "holds" if check.holds else "does not hold"
        verdict += "" if check.num_traces == check.num_declared else " so far"
        seeds = f"{counted(check.ratio.n, 'seed')}, " if check.ratio else ""
        traces = f"{check.num_traces} of {counted(check.num_declared, 'declared trace')}"
        yield f"{check.claim}: {found} against the bar {check.bar:g}, {seeds}{traces}; it {verdict}."


def _what_decides(errors: Sequence[DecisionError]) -> Iterator[str]:
    """The factor that moves arrival's error most, and the one that moves the gain of others most, where the seeds show it."""
    found = levels(errors)
    by_seed = [levels([e for e in errors if e.seed == seed]) for seed in dict.fromkeys(e.seed for e in errors)]
    yield from _decider("The error of arrival", ".2%", lambda level: level.arrival, found, by_seed)
    for name in ("ewma", "linear", "mu"):
        if any(name in level.ratios for level in found):
            yield from _decider(f"The error of {name} over that of arrival", ".2f", partial(_ratio_of, name), found, by_seed)


def _decider(
    what: str, form: str, value: Callable[[Level], float], found: Sequence[Level], by_seed: Sequence[Sequence[Level]]
) -> Iterator[str]:
    by_factor = {name: sorted((x for x in found if x.factor == name), key=value) for name in _FACTOR_NAMES}
    varied = {factor: own for factor, own in by_factor.items() if len(own) > 1}
    spread = {factor: value(own[-1]) / value(own[0]) for factor, own in varied.items() if value(own[0]) > 0}
    for factor in (factor for factor in varied if factor not in spread):
        none = ", ".join(level.level for level in varied[factor] if value(level) == 0)
        yield f"{what} is 0 at {none}, so no ratio says how much {_FACTOR_NAMES[factor]} moves it."
    if not spread:
        return
    most = max(spread, key=spread.__getitem__)
    if spread[most] < _NOTHING:
        every = "every factor" if len(spread) == len(varied) else "every other factor"
        yield f"{what} changes by less than {_NOTHING - 1:.0%} with {every}."
        return
    low, high = varied[most][0], varied[most][-1]
    ratio = _ratio_over_seeds(value, low, high, by_seed)
    is_shown = ratio is not None and ratio.sign > 0
    others = ", ".join(f"{_FACTOR_NAMES[factor]} {spread[factor]:.1f}" for factor in spread if factor != most)
    yield (
        f"{what} {'depends most on' if is_shown else 'is not shown to depend on any factor; it differs most with'} "
        f"{_FACTOR_NAMES[most]}: {value(low):{form}} at {low.level}, {value(high):{form}} at {high.level}, a factor of "
        f"{spread[most]:.1f}{f' ({others})' if others else ''}; by seed {interval(ratio, '.1f')}."
        + (f" {STAGE}" if most == "window" else "")
    )


def _ratio_over_seeds(
    value: Callable[[Level], float], low: Level, high: Level, by_seed: Sequence[Sequence[Level]]
) -> Estimate | None:
    """``value(high) / value(low)`` over the seeds that have both; None with fewer than two, or where one of them is 0."""
    values = [{(x.factor, x.level): value(x) for x in own} for own in by_seed]
    ends = (high.factor, high.level), (low.factor, low.level)
    pairs = [tuple(own[end] for end in ends) for own in values if all(end in own for end in ends)]
    return geometric_mean([a / b for a, b in pairs]) if len(pairs) > 1 and all(map(all, pairs)) else None


def _ratio_of(name: str, level: Level) -> float:
    return level.ratios[name]


def _routes(study: Study) -> Iterator[str]:
    """The cheapest exact route, and by engine what no other choice beats."""
    for index, (engine, own) in enumerate(choices(study).items()):
        exact = [choice for choice in own if choice.name not in ROUTES]
        if exact and not index:
            ends = " to ".join(f"{choice.extra_s:.3f} s ({choice.name})" for choice in (exact[0], exact[-1]))
            yield f"Exact routes add {ends} to an update. Overlapped work and stalls of the engine are not in these seconds."
            yield f"Costs that differ by no more than {NOISE:.0%} of the median update count as equal."
        best = ", ".join(f"{choice.name} ({choice.extra_s:.3f} s, {choice.error:.2%})" for choice in own if choice.on_frontier)
        yield f"On the frontier of cost and decision error with {engine}: {best}."
