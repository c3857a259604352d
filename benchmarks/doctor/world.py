"""Healthy batches of any trainer: two engines with their noise, versions that drift, turns, groups, a clip and a band.

A token's distribution is a softmax over `vocab` words. The trainer's logits at a version are those at the newest one less the
drift since; the engine's are the trainer's at the version that samples, and noise. Tokens are drawn from the engine's
distribution, so that the mean of r_d is 1 as in any two real engines.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from oldlogits.batch.token_table import TokenTable
from oldlogits.doctor.tokens import Batch

Floats = NDArray[np.floating]
Ints = NDArray[np.int64]
Columns = dict[str, NDArray[np.generic]]

NUMERICS: Final[Mapping[str, float]] = {"fp32": 2e-6, "bf16": 0.02, "fp8": 0.06, "int4": 0.15}
"""Standard deviation of an engine's noise, in logits, as its arithmetic makes it."""
LAGS: Final = ("on-policy", "one-behind", "mixed", "far")
VOCABULARIES: Final = (32, 96, 256)
TEMPERATURES: Final = (0.6, 1.0, 1.3)
EPS_LOW, EPS_HIGH, DUAL, BAND = 0.2, 0.28, 3.0, 1.5
NEWEST: Final = 12


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What kind of trainer a batch is of."""

    seed: int
    lag: str
    numerics: str
    vocab: int
    temperature: float
    drift: float
    steps: int
    denominator: str
    peak: float

    @classmethod
    def draw(cls, seed: int, **fixed: object) -> Setting:
        """Draw a setting by seed; `fixed` values are taken as they are."""
        rng = np.random.default_rng([seed, 1])
        numerics = str(rng.choice(list(NUMERICS)))
        drawn = cls(
            seed=seed,
            lag=str(rng.choice(LAGS)),
            numerics=numerics,
            vocab=int(rng.choice(VOCABULARIES)),
            temperature=float(rng.choice(TEMPERATURES)),
            drift=max(float(rng.uniform(0.08, 0.4)), 4 * NUMERICS[numerics]),
            steps=int(rng.integers(1, 3)),
            denominator=str(rng.choice(["token-mean", "sequence-mean"])),
            peak=float(rng.uniform(0.5, 2.5)),
        )
        return dataclasses.replace(drawn, **fixed)  # type: ignore[arg-type]

    def __str__(self) -> str:
        return f"{self.lag}, {self.numerics}, {self.vocab} words, T = {self.temperature:g}, {self.steps} steps"


@dataclass(kw_only=True)
class World:
    """Loss tokens of a batch with all that is true of them; a fault changes it, or the columns that `columns` makes.

    Attributes:
        logits: [token, word]; the trainer's at the newest version.
        moved: [version back, token, word]; the drift of each of the newest versions.
        second: [token, word]; what the first optimizer step adds to the logits of tokens of the second.
    """

    setting: Setting
    rng: np.random.Generator
    trajectory: Ints
    segment: Ints
    index: Ints
    version: Ints
    label: Ints
    logits: Floats
    moved: Floats
    second: Floats
    noise: Floats
    prompts: Ints
    lengths: Ints
    token: Ints
    mu: Floats

    @property
    def num(self) -> int:
        """Loss tokens."""
        return len(self.trajectory)

    def at(self, version: Ints) -> Floats:
        """Give the trainer's logits [token, word] at a version for each token."""
        logits = self.logits.copy()
        for back, moved in enumerate(self.moved):
            older = np.flatnonzero(NEWEST - version > back)
            logits[older] -= moved[older]
        return logits

    def logp(self, logits: Floats, temperature: float | None = None) -> Floats:
        """float32 [token]: log-probs of the drawn tokens."""
        return log_softmax(logits / np.float32(temperature or self.setting.temperature))[np.arange(self.num), self.token]

    def sample(self, logits: Floats) -> None:
        """Draw the tokens from a distribution, whose log-probs become mu."""
        scaled = logits / np.float32(self.setting.temperature)
        self.token = (scaled - np.log(self.rng.standard_exponential(scaled.shape, np.float32) + np.float32(6e-8))).argmax(1)
        self.mu = self.logp(logits)

    def columns(self) -> Columns:
        """The columns of the loss tokens, as a trainer without faults writes them."""
        old, theta = self.logp(self.at(self.label)), self.logp(self.logits + self.second)
        group = self.trajectory // 4
        advantage = self.rng.normal(size=self.trajectory.max() + 1)[self.trajectory].astype(np.float32)
        advantage[group == 1] = 0
        r_s, r_d = theta - old, old - self.mu
        falls = (r_s < np.log(1 - EPS_LOW)) | (r_s > np.log(DUAL))
        clipped = np.where(advantage > 0, r_s > np.log(1 + EPS_HIGH), (advantage < 0) & falls)
        length = np.bincount(self.trajectory)[self.trajectory]
        by_sequence = 1 / (length * (self.trajectory.max() + 1))
        return {
            "trajectory": self.trajectory, "group": group, "segment": self.segment, "index": self.index, "token_id": self.token,
            "mask": np.ones(self.num, np.bool_), "version": self.label, "trainer_version": np.full(self.num, NEWEST),
            "logp_mu": self.mu, "logp_old": old, "logp_theta": theta, "advantage": advantage,
            "kept": ~clipped & (np.abs(r_d) <= np.log(BAND)),
            "loss_weight": (by_sequence if self.setting.denominator == "sequence-mean" else np.full(self.num, 1 / self.num)),
        }  # fmt: skip

    def table(self, columns: Columns, missing: Mapping[str, NDArray[np.bool_]] | None = None) -> TokenTable:
        """A table of loss tokens and of the prompts before them."""
        first = np.flatnonzero(np.diff(self.trajectory, prepend=-1) != 0)
        num = len(first) * self.prompts.shape[1]
        rows: Columns = {}
        gone: dict[str, NDArray[np.bool_]] = {}
        for name, column in columns.items():
            blank = {"f": np.nan, "b": name == "kept", "i": -1}[column.dtype.kind]
            rows[name] = np.concatenate([np.full(num, blank, column.dtype), column])
            if column.dtype.kind == "f":
                own = (missing or {}).get(name, np.zeros(self.num, np.bool_))
                gone[name] = np.concatenate([np.ones(num, np.bool_), own])
        names = np.repeat(columns["trajectory"][first], self.prompts.shape[1])
        rows["trajectory"][:num], rows["group"][:num] = names, np.repeat(columns["group"][first], self.prompts.shape[1])
        rows["index"][:num] = np.tile(np.arange(self.prompts.shape[1]), len(first))
        rows["token_id"][:num] = self.prompts[self.trajectory[first] // 4].ravel()
        rows["trainer_version"][:num] = np.repeat(columns["trainer_version"][first], self.prompts.shape[1])
        named = {name: [f"t{one}" for one in range(int(rows[name].max()) + 1)] for name in ("trajectory", "group")}
        return TokenTable.of(rows, gone, named)

    def batch(self, columns: Columns, missing: Mapping[str, NDArray[np.bool_]] | None = None, source: str = "batch") -> Batch:
        """A batch of the columns."""
        return Batch(source=source, framework="", table=self.table(columns, missing))


def log_softmax(logits: Floats) -> Floats:
    """Natural-log probabilities over the last axis."""
    shifted = logits - logits.max(1, keepdims=True)
    logp: Floats = (shifted - np.log(np.exp(shifted).sum(1, keepdims=True))).astype(np.float32)
    return logp


def make_world(setting: Setting, num_trajectories: int = 64) -> World:
    """Draw a world: trajectories of 2 to 5 segments of 8 to 40 tokens, in groups of 4, by the seed."""
    rng = np.random.default_rng([setting.seed, 2])
    segments = rng.integers(2, 6, num_trajectories)
    lengths = rng.integers(8, 41, int(segments.sum()))
    owner = np.repeat(np.arange(num_trajectories), segments)
    first = np.cumsum(segments) - segments
    number = np.arange(len(owner)) - first[owner]
    version = _versions(setting, rng, owner, number, num_trajectories)
    of = np.repeat(np.arange(len(owner)), lengths)
    num = len(of)
    begin = np.cumsum(lengths) - lengths
    gap = 8 + 5 * number
    index = np.arange(num) - begin[first[owner[of]]] + gap[of]
    scale = np.exp(rng.normal(np.log(setting.peak), 0.7, (num, 1)))
    logits = (scale * rng.standard_normal((num, setting.vocab))).astype(np.float32)
    logits[np.arange(num), rng.integers(0, setting.vocab, num)] += (6 * rng.exponential(1, num)).astype(np.float32)
    heavy = NUMERICS[setting.numerics] * np.sqrt(4 / rng.chisquare(4, (num, 1))).astype(np.float32)
    shape = (num, setting.vocab)
    noise = heavy * rng.standard_normal(shape, np.float32)
    far = int(NEWEST - version.min())
    moved = np.float32(setting.drift) * rng.standard_normal((far, *shape), np.float32)
    later = (owner[of] % 2 == 1) & (setting.steps == 2)
    second = np.float32(0.5 * setting.drift) * later[:, None] * rng.standard_normal(shape, np.float32)
    prompts = np.random.default_rng([setting.seed, 3]).integers(0, 999, (num_trajectories // 4, 8))
    world = World(
        setting=setting, rng=rng, trajectory=owner[of], segment=number[of], index=index, version=version[of], label=version[of],
        logits=logits, moved=moved, second=second, noise=noise, prompts=prompts, lengths=lengths, token=index, mu=logits[:, 0],
    )  # fmt: skip
    world.sample(world.at(world.version) + noise)
    return world


def _versions(setting: Setting, rng: np.random.Generator, owner: Ints, number: Ints, num: int) -> Ints:
    """The version of each segment: never falling within a trajectory, and at most the newest."""
    if setting.lag in ("on-policy", "one-behind"):
        return np.full(len(owner), NEWEST - (setting.lag == "one-behind"))
    start = np.repeat(NEWEST - rng.integers(0, {"mixed": 4, "far": 8}[setting.lag], num // 4), 4)
    steps = (rng.random(len(owner)) < 0.4) & (number > 0)
    total = np.cumsum(steps)
    versions: Ints = np.minimum(start[owner] + total - total[np.flatnonzero(number == 0)][owner], NEWEST)
    return versions
