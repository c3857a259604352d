"""What a simulation is given: step times, workload, and the keys of a recipe that shape the loop."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

from oldlogits.rollout.turn_latency import Kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One turn: tokens that the environment added before it, and tokens that it samples."""

    num_read: int
    num_sampled: int


Quantiles = tuple[tuple[float, float], ...]

Episode = tuple[Turn, ...]
"""The turns of one trajectory; what is read before the first is the prompt."""


class Workload(Protocol):
    """What is rolled out."""

    def draw_group(self, size: int, rng: random.Random) -> Sequence[Episode]:
        """The episodes of a group."""
        ...

    def draw_gap_s(self, kind: Kind, rng: random.Random) -> float:
        """Seconds that a trajectory waits for what is outside the engine."""
        ...

    @property
    def common_tokens(self) -> int:
        """Tokens at the beginning of every prompt, whatever the task."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineTimes:
    """A decode step of n sequences that attend to c tokens takes ``step_s + n sequence_s + c context_s``.

    What joins between two steps is prefilled first: ``wave_s``, and ``prefill_s`` for each token.

    Args:
        step_s: Seconds of a step, whatever it does.
        sequence_s: Seconds for each sequence that it decodes.
        context_s: Seconds for each token that its sequences attend to.
        wave_s: Seconds of a prefill, whatever it does.
        prefill_s: Seconds for each token of a prompt that is not in the cache.
        message_s: Seconds for each request, in which the engine does not work on a step: taking and answering it.
    """

    step_s: float
    sequence_s: float = 0.0
    context_s: float = 0.0
    wave_s: float = 0.0
    prefill_s: float = 0.0
    message_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerTimes:
    """Seconds of the parts of an update.

    Args:
        read_s: A token that a scoring forward pass reads.
        checkout_s: Making another version the one that scores.
        token_s: A token of the batch, over all optimizer steps: forward, backward, and its share of the optimizer.
        rest_s: What else precedes the optimizer steps: building and handing over the batch.
        publish_s: Storing the version, and giving its weights away.
        after_s: What follows once the engine goes on: its check, what is not needed any more is dropped.
        between_s: From the end of an update to the beginning of the next: recording. No turn that ends meanwhile is seen.
        first_s: Once, in the first update: what is done only then.
        busy_share: Share of all these but scoring and `between_s` in which the trainer itself works, in (0, 1]: the
            controller has the rest.
    """

    read_s: float
    token_s: float
    checkout_s: float = 0.0
    rest_s: float = 0.0
    publish_s: float = 0.0
    after_s: float = 0.0
    between_s: float = 0.0
    first_s: float = 0.0
    busy_share: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """How much longer than usual everything takes in one update; what slows a machine slows all that runs on it."""

    trainer: float = 1.0
    engine: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ScorerTimes:
    """Of the second model of the route "dedicated".

    Args:
        read_s: A token that its forward pass reads.
        checkout_s: Making another version the one that scores.
        publish_s: Taking over a version.
        window: Versions that it holds.
    """

    read_s: float
    checkout_s: float = 0.0
    publish_s: float = 0.0
    window: int = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A run to simulate.

    Args:
        name: Shown.
        route: A key of `oldlogits.core.source.SOURCES`.
        workload: What is rolled out.
        engine: Step times of one engine.
        trainer: Step times of the trainer.
        scorer: Of the route "dedicated".
        num_engines: Engines; a trajectory stays with one.
        max_num_seqs: Sequences that one engine decodes at the same time.
        pause_s: Until the engines rest, once asked to; they work on meanwhile.
        load_s: Giving them new weights; they rest.
        group_size: Episodes per group.
        prompts_per_update: Groups that one update trains.
        max_running_groups: As in a recipe; 0: as many as the bound admits.
        max_staleness: As in a recipe.
        num_updates: Updates.
        skip: First updates that are left out of the figures.
        stops: Whether no group is started that these updates do not train, as at the end of a run; else it is cut off.
        conditions: Of consecutive updates; taken in this order and over again, from one that the seed draws. Starts are paced
            by the update before, so that uneven updates make the trainer wait where even ones do not.
        recompute: Whether keys and values are computed anew after a weight update.
        found_share: Share of a prompt that the engine's cache holds, as measured; None: by what turns, groups and weight
            updates leave in it.
        filtered_share: Groups that are left out for rewards that are all equal.
        seed: Of what is drawn.
    """

    name: str
    route: str
    workload: Workload
    engine: EngineTimes
    trainer: TrainerTimes
    scorer: ScorerTimes | None = None
    num_engines: int = 1
    max_num_seqs: int = 128
    pause_s: float = 0.0
    load_s: float = 0.0
    group_size: int = 8
    prompts_per_update: int = 16
    max_running_groups: int = 0
    max_staleness: int = 4
    num_updates: int = 24
    skip: int = 4
    stops: bool = False
    conditions: tuple[Condition, ...] = (Condition(),)
    recompute: bool = True
    found_share: float | None = None
    filtered_share: float = 0.0
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnWorkload:
    """Episodes drawn from given distributions: log-normal sizes, heavy-tailed gaps.

    A log-normal variable of mean m and coefficient of variation c is ``m exp(s z - s^2 / 2)``, ``s^2 = ln(1 + c^2)``.
    """

    prompt_tokens: int = 4000
    """Of the prompt, tools included; the same for a group."""
    turns: float = 8.0
    """Mean turns of an episode; log-normal, at least 1."""
    turns_variation: float = 0.5
    """Their coefficient of variation."""
    max_turns: int = 40
    """Most turns."""
    sampled_tokens: float = 250.0
    """Mean tokens that a turn samples; log-normal, at least 1."""
    sampled_variation: float = 1.0
    """Their coefficient of variation."""
    read_tokens: float = 400.0
    """Mean tokens that the environment adds between two turns; log-normal, at least 1."""
    read_variation: float = 1.0
    """Their coefficient of variation."""
    gap_s: float = 2.0
    """Mean seconds between two turns: a tool, a simulated user; log-normal."""
    gap_variation: float = 2.0
    """Their coefficient of variation."""
    common_tokens: int = 3000
    """Tokens at the beginning of every prompt, whatever the task: system prompt and tools."""
    max_tokens: int = 32768
    """Tokens of an episode at which it is cut off."""

    def draw_group(self, size: int, rng: random.Random) -> Sequence[Episode]:
        """Independent episodes over the same prompt."""
        return [self._episode(rng) for _ in range(size)]

    def draw_gap_s(self, kind: Kind, rng: random.Random) -> float:
        """Log-normal between turns and after the last, 0 before the first."""
        return 0.0 if kind == "first" else _log_normal(self.gap_s, self.gap_variation, rng)

    def _episode(self, rng: random.Random) -> Episode:
        num_turns = min(self.max_turns, max(1, round(_log_normal(self.turns, self.turns_variation, rng))))
        turns: list[Turn] = []
        left = self.max_tokens
        for i in range(num_turns):
            read = max(1, round(_log_normal(self.read_tokens, self.read_variation, rng))) if i else self.prompt_tokens
            sampled = max(1, round(_log_normal(self.sampled_tokens, self.sampled_variation, rng)))
            left -= read + sampled
            if left < 0 and turns:
                break
            turns.append(Turn(num_read=read, num_sampled=sampled))
        return tuple(turns)

    @property
    def mean_context(self) -> float:
        """About the tokens that a running sequence holds: half an episode."""
        return self.prompt_tokens + self.turns * (self.sampled_tokens + self.read_tokens) / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredWorkload:
    """Groups of a run, drawn with replacement, and the quantiles of its gaps.

    Args:
        groups: The episodes of each group.
        gaps_s: Of each kind pairs ``(-ln(1 - u), quantile of u)``, ascending; joined by straight lines, which an
            exponential distribution is. None: there is no gap.
        common_tokens: Tokens at the beginning of every prompt, whatever the task.
    """

    groups: tuple[tuple[Episode, ...], ...]
    gaps_s: Mapping[Kind, Quantiles] = field(default_factory=dict)
    common_tokens: int = 0

    def draw_group(self, size: int, rng: random.Random) -> Sequence[Episode]:
        """A group of the run; where it has not `size` members, some are drawn once more, or left out."""
        group = rng.choice(self.groups)
        return group if len(group) == size else [rng.choice(group) for _ in range(size)]

    def draw_gap_s(self, kind: Kind, rng: random.Random) -> float:
        """By inversion."""
        points = self.gaps_s.get(kind)
        if not points:
            return 0.0
        x = min(-math.log(1.0 - rng.random()), points[-1][0])
        (x0, y0), (x1, y1) = next((a, b) for a, b in pairwise(points) if x <= b[0])
        return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def _log_normal(mean: float, variation: float, rng: random.Random) -> float:
    spread = math.sqrt(math.log1p(variation**2))
    return mean * math.exp(rng.gauss(0.0, spread) - spread**2 / 2)
