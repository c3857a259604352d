"""What is done to which process and when: the kinds, the moments, and a plan of trials drawn from a seed."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from oldlogits.rpc.processes import PREFIX

Way = Literal["kill", "freeze", "disk"]

CHECKPOINT_EVERY: Final = 3
EVAL_EVERY: Final = 4
"""Versions between two checkpoints, and between two evaluations."""
NUM_SLOTS: Final = 4
"""Turns that the engine samples at the same time, for 16 episodes an update."""
STRIKES: Final = 4
"""Trials on one run, which goes on after each."""

MOMENTS: Final = ("random", "checkpoint", "publish", "evaluation", "warm start", "resume")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A kind of process, and what is done to it.

    Args:
        setup: The kind of run that has one.
        title: How its name begins where the system lists it; empty: the command itself.
        way: What is done to it.
        goes_on: Whether the run outlives it.
    """

    setup: str
    title: str
    way: Way = "kill"
    goes_on: bool = False


SETUPS: Final[Mapping[str, Sequence[str]]] = {
    "local": [],
    "others": ["--env.target", "benchmarks.kills.environments:OtherDesk"],
    "dedicated": ["--proximal.source", "dedicated"],
    "servers": [
        "--engine.type",
        "vllm",
        "--engine.server",
        "embedded",
        "--engine.num-servers",
        "2",
        "--engine.control-timeout-s",
        "10",
    ],
    "ray": ["--runtime.type", "ray"],
}
"""The flags of each kind of run."""

NOT_RESTORED: Final = {"others"}
"""Kinds of run whose environment nobody can carry on: what its episodes lose by that is counted apart."""

WEIGHTS: Final = {"local": 8, "others": 1, "dedicated": 4, "servers": 4, "ray": 1}
"""How often a kind of run is drawn."""

KINDS: Final = {
    "controller": Kind(setup="local", title=""),
    "other answers": Kind(setup="others", title=""),
    "engine": Kind(setup="local", title=f"{PREFIX}engin"),
    "trainer": Kind(setup="local", title=f"{PREFIX}train"),
    "scorer": Kind(setup="dedicated", title=f"{PREFIX}score"),
    "server": Kind(setup="servers", title=f"{PREFIX}serve", goes_on=True),
    "engine of a server": Kind(setup="servers", title=f"{PREFIX}engin", goes_on=True),
    "worker of a cluster": Kind(setup="ray", title="ray::Worker", goes_on=True),
    "server of a worker": Kind(setup="ray", title=f"{PREFIX}serve", goes_on=True),
    "trainer of a cluster": Kind(setup="ray", title="ray::Calls"),
    "frozen controller": Kind(setup="local", title="", way="freeze", goes_on=True),
    "frozen engine": Kind(setup="local", title=f"{PREFIX}engin", way="freeze"),
    "frozen trainer": Kind(setup="local", title=f"{PREFIX}train", way="freeze"),
    "frozen scorer": Kind(setup="dedicated", title=f"{PREFIX}score", way="freeze"),
    "frozen server": Kind(setup="servers", title=f"{PREFIX}serve", way="freeze", goes_on=True),
    "frozen server engine": Kind(setup="servers", title=f"{PREFIX}engin", way="freeze", goes_on=True),
    "full disk": Kind(setup="local", title="", way="disk"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One strike: whom, when, and how much later.

    Args:
        kind: A key of `KINDS`.
        moment: One of `MOMENTS`.
        skipped: Occasions of that kind that are let go by.
        delay_s: Seconds after the occasion.
        pick: Which of several processes of the kind, from 0 to 1.
    """

    kind: str
    moment: str
    skipped: int
    delay_s: float
    pick: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A run, and the trials on it, in order."""

    setup: str
    trials: tuple[Trial, ...]


def plans(num: int, seed: int, kinds: Sequence[str], moments: Sequence[str]) -> list[Plan]:
    """Draw runs of `STRIKES` trials each until there are `num` trials, the same ones for the same seed."""
    rng, found = random.Random(seed), list[Plan]()
    setups = [setup for setup in SETUPS if any(KINDS[kind].setup == setup for kind in kinds)]
    while num > 0:
        setup = rng.choices(setups, [WEIGHTS[one] for one in setups])[0]
        count = min(STRIKES, num)
        found.append(Plan(setup=setup, trials=tuple(_trial(rng, setup, kinds, moments, i) for i in range(count))))
        num -= count
    return found


def _trial(rng: random.Random, setup: str, kinds: Sequence[str], moments: Sequence[str], index: int) -> Trial:
    """A trial; the first one of a run is in no resume, and a later one in no warm start."""
    open_to = [moment for moment in moments if moment != ("warm start" if index else "resume")] or ["random"]
    moment, own = rng.choice(open_to), [kind for kind in kinds if KINDS[kind].setup == setup]
    if moment == "warm start":  # there is no other process yet, and nothing to say
        own = ["controller"]
    delay = {"random": 0.5, "checkpoint": 0.05, "publish": 0.03, "evaluation": 0.25, "warm start": 1.0, "resume": 6.0}[moment]
    skipped = rng.randrange(120) if moment == "random" else rng.randrange(2)
    kind = rng.choice(own)
    return Trial(kind=kind, moment=moment, skipped=skipped, delay_s=rng.uniform(0.0, delay), pick=rng.random())
