"""The panel that ends a run: what was learned, whether the old logits were exact, and what to do next, in sentences."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from oldlogits.record.failures import in_words
from oldlogits.record.folder import RunFolder
from oldlogits.record.intervals import verdict_of
from oldlogits.record.summary import Summary


def print_summary(summary: Summary, run_folder: Path, *, console: Console | None = None) -> None:
    """Say in plain words what was learned, whether the old logits were exact, and where the report is."""
    out = console or Console()
    lines = [learned_sentence(summary), *reward_sentences(summary), *environment_sentences(summary)]
    lines += [staleness_sentence(summary), *exactness_sentences(summary)]
    lines += [*failure_sentences(summary), *program_sentences(summary.gateway)]
    if summary.ended != "done":
        lines.insert(0, f"The run ended early ({summary.ended}).")
    body = Text("\n".join(lines) + "\n")
    body.append(f"\nrun folder  {run_folder}\nreport      {run_folder / 'report.html'}", style="dim")
    out.print(Panel(body, title=f"{summary.variant}, {summary.num_updates} updates", title_align="left", border_style="green"))
    out.print(*next_lines(run_folder), sep="\n", markup=False, highlight=False, soft_wrap=True)


def next_lines(run_folder: Path) -> list[str]:
    """Three lines to copy: what a person does next with a run; one that has no checkpoint has no agent to watch."""
    run, recipe = shlex.quote(str(run_folder)), shlex.quote(str(run_folder / "config.toml"))
    has_agent = RunFolder(path=run_folder).latest_checkpoint() is not None
    return [
        f"see it           oldlogits watch {run}",
        *([f"watch the agent  oldlogits play {run} --model {run}"] if has_agent else []),
        f"change one key   oldlogits train {recipe} --trainer.lr 1e-4",
    ]


def learned_sentence(summary: Summary) -> str:
    """Before -> after with intervals, and whether the difference is beyond chance."""
    before, after, gain = summary.success_before, summary.success_after, summary.gain
    if before is None or after is None:
        only, failed = before or after, sum(summary.evaluation_failures.values())
        if failed:
            said = f"Held-out success {only}" if only else "HELD-OUT SUCCESS WAS NOT MEASURED"
            return f"{said}: all episodes of {'the other' if only else 'each'} evaluation failed."
        return f"Held-out success {only}; no comparison." if only else "Held-out success was not measured."
    text = f"Held-out success {before} -> {after}"
    if gain is None:
        return text + "."
    points = f"{100 * gain.mean:+.1f} points {gain.bounds('+.1f', times=100)}"
    return f"{text}: {points} on the same {gain.num_episodes} episodes, {verdict_of(gain)}."


def reward_sentences(summary: Summary) -> Iterator[str]:
    """The mean reward before -> after, and what counts as a success; nothing without an evaluation."""
    before, after, gain = summary.reward_before, summary.reward_after, summary.reward_gain
    shown = " -> ".join(interval.plain for interval in (before, after) if interval is not None)
    if shown and summary.success_at is not None:
        change = f": {gain.change}" if gain is not None else ""
        yield f"Mean reward {shown}{change}; a success is a reward of {summary.success_at:g} or more."


def environment_sentences(summary: Summary) -> Iterator[str]:
    """What was learned in each environment of a mixture; nothing without one."""
    for name, found in summary.environments.items():
        yield f"  {name}: {' -> '.join(str(one) for one in (found.before, found.after) if one is not None)}"


def failure_sentences(summary: Summary) -> Iterator[str]:
    """How many episodes of training and of evaluations their environment ended, and for which reasons; nothing without any."""
    for what, num, failures in (
        ("training", summary.accounting.get("submitted", 0), summary.failures),
        ("held-out", summary.num_evaluation_episodes, summary.evaluation_failures),
    ):
        if failures:
            yield f"{sum(failures.values())} of {num} {what} episodes failed: {in_words(failures)}."


def program_sentences(found: Mapping[str, int]) -> Iterator[str]:
    """What an agent program asked for, and what became of it (`Summary.gateway`); nothing without one."""
    if found:
        num = {name: f"{count:,}" for name, count in found.items()}
        turns = sum(found[kind] for kind in ("opened", "continued", "forked", "rewritten"))
        yield (
            f"The program was given {turns:,} turns: {num['forked']} from an earlier one, {num['rewritten']} after it rewrote "
            f"its history ({num['encoded_anew_tokens']} tokens encoded anew). {num['dropped_answers']} answers dropped "
            f"({num['dropped_tokens']} tokens), {num['overridden']} parameters overridden, {num['refused']} requests refused."
        )


def exactness_sentences(summary: Summary) -> Iterator[str]:
    """The three parts of exactness, as far as they were measured (docs/exactness.md); nothing where OLD was not computed."""
    found = [f"weights bit-exact ({summary.num_digests:,} checkouts by digest)"] if summary.num_digests else []
    if summary.consistency_lag0_max_abs_error is not None:
        found.append(f"lag-0 error {summary.consistency_lag0_max_abs_error:.2g}")
    if found and summary.packing_max_abs_error is not None:
        mean, largest = summary.packing_mean_abs_error, summary.packing_max_abs_error
        found.append(f"packing noise {mean:.2g} on average and {largest:.2g} at most, in nats")
    if found:
        yield f"Exactness: {', '.join(found)}."


def staleness_sentence(summary: Summary) -> str:
    """How much was trained, how stale it was, and how the proximal policy's log-probs were obtained."""
    total = sum(summary.provenance.values())
    kinds = ", ".join(f"{count / total:.1%} {kind}" for kind, count in sorted(summary.provenance.items()) if count)
    text = f"{summary.num_trajectories} trajectories, {summary.num_multi_version_trajectories} of several versions"
    if summary.staleness_max is not None and summary.staleness_mean is not None:
        text += f"; staleness mean {summary.staleness_mean:.2f}, max {summary.staleness_max}"
    return text + (f"; proximal log-probs: {kinds}." if kinds else ".")
