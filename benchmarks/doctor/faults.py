"""One planted fault for each check: what real trainers were reported to do, in a batch that is healthy otherwise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from benchmarks.doctor.world import NEWEST, NUMERICS, Setting, World, log_softmax, make_world
from oldlogits.doctor.tokens import Batch

Plant = Callable[[Setting], list[Batch]]


@dataclass(frozen=True, slots=True)
class Fault:
    """A planted fault.

    Args:
        check: The check that has to find it.
        what: What is wrong with the batches.
        plant: Makes the batches of a setting.
        lag: The lags that the fault needs to be one; "" for any.
    """

    check: str
    what: str
    plant: Plant
    lag: str = ""


def _changed(change: Callable[[World, dict[str, np.ndarray]], None], **fixed: object) -> Plant:
    """Change the columns of a healthy batch."""

    def plant(setting: Setting) -> list[Batch]:
        world = make_world(replace(setting, **fixed))  # type: ignore[arg-type]
        columns = world.columns()
        change(world, columns)
        return [world.batch(columns)]

    return plant


def _old_is(other: str) -> Plant:
    return _changed(lambda world, columns: columns.update(logp_old=columns[other].copy()), steps=1)


def _of_arrival(world: World, columns: dict[str, np.ndarray]) -> None:
    columns["logp_old"] = world.logp(world.logits)
    columns["logp_theta"] = world.logp(world.logits + world.setting.drift * world.rng.normal(size=world.logits.shape))


def _keep_all(world: World, columns: dict[str, np.ndarray]) -> None:
    columns["kept"][:] = True


def _unbounded(world: World, columns: dict[str, np.ndarray]) -> None:
    low = np.flatnonzero((columns["advantage"] < 0) & (columns["logp_old"] < -2.5))[:6]
    columns["logp_theta"][low] = -0.1
    columns["kept"][low] = True


def _placeholder(world: World, columns: dict[str, np.ndarray]) -> None:
    columns["logp_mu"][_some_segments(world, 3)] = 0.0


def _some_segments(world: World, num: int) -> np.ndarray:
    segment = world.trajectory * 8 + world.segment
    return np.isin(segment, world.rng.choice(np.unique(segment), num, replace=False))


def _impossible(world: World, columns: dict[str, np.ndarray]) -> None:
    columns["logp_mu"][world.rng.integers(0, world.num, 4)] = world.rng.choice([0.25, np.nan, -np.inf])


def _missing(setting: Setting) -> list[Batch]:
    world = make_world(setting)
    columns, gone = world.columns(), _some_segments(world, 2)
    columns["logp_mu"][gone] = np.nan
    return [world.batch(columns, {"logp_mu": gone})]


def _shift(world: World, columns: dict[str, np.ndarray]) -> None:
    columns["logp_mu"] = np.roll(columns["logp_mu"], world.rng.choice([-1, 1]))


def _unlabelled(world: World, columns: dict[str, np.ndarray]) -> None:
    columns["version"] = np.where(_some_segments(world, 2), -1, columns["version"])


def _ahead(world: World, columns: dict[str, np.ndarray]) -> None:
    columns["version"] = columns["version"] + 1


def _relabelled(late: bool) -> Plant:
    """Labels of whole groups, or of the request before; OLD is scored at the label."""

    def plant(setting: Setting) -> list[Batch]:
        world = make_world(setting)
        key = world.trajectory * 8 + world.segment
        first = np.flatnonzero(np.diff(key, prepend=-1) != 0)
        length = np.diff(np.append(first, world.num))
        version, begins = world.version[first], world.segment[first] == 0
        if late:
            label = np.where(begins, version, np.roll(version, 1))
        else:
            oldest = np.full(world.trajectory.max() // 4 + 1, NEWEST)
            np.minimum.at(oldest, world.trajectory[first] // 4, version)
            label = oldest[world.trajectory[first] // 4]
        world.label = np.repeat(label, length)
        return [world.batch(world.columns())]

    return plant


def _resampled(logits: Callable[[World], np.ndarray]) -> Plant:
    """Sample from other logits than those of the engine's noise."""

    def plant(setting: Setting) -> list[Batch]:
        world = make_world(setting)
        world.sample(logits(world))
        return [world.batch(world.columns())]

    return plant


def _top_p(world: World) -> np.ndarray:
    logits = world.at(world.version) + world.noise
    p = np.exp(log_softmax(logits / world.setting.temperature))
    order = np.argsort(-p, axis=1)
    ranked = np.take_along_axis(p, order, 1)
    out = np.cumsum(ranked, 1) - ranked > 0.95
    mask = np.zeros_like(out)
    np.put_along_axis(mask, order, out, 1)
    return np.where(mask, -np.float32(80), logits)


def _raw(setting: Setting) -> list[Batch]:
    """The engine reports log-probs of raw logits, and samples at its temperature."""
    world = make_world(replace(setting, temperature=0.6 if setting.temperature == 1 else setting.temperature))
    world.mu = world.logp(world.at(world.version) + world.noise, 1.0)
    return [world.batch(world.columns())]


def _cache(world: World) -> np.ndarray:
    """Keys and values of the version before: some of its drift is in the logits behind a change."""
    behind = world.version > world.version[np.searchsorted(world.trajectory, world.trajectory)]
    before = world.at(np.maximum(world.version - 1, world.version.min()))
    mixed = 0.5 * (before + world.at(world.version))
    return np.where(behind[:, None], mixed, world.at(world.version)) + world.noise


def _border(world: World) -> np.ndarray:
    first = (np.diff(world.trajectory * 8 + world.segment, prepend=-1) != 0) & (world.segment > 0)
    strength = max(8 * NUMERICS[world.setting.numerics], 0.5)
    wrong = strength * world.rng.normal(size=world.logits.shape)
    return world.at(world.version) + world.noise + np.where(first[:, None], wrong, 0)


def _denied(world: World, columns: dict[str, np.ndarray]) -> None:
    sure = np.flatnonzero(columns["logp_mu"] > np.log(0.9))
    chosen = world.rng.choice(sure, max(len(sure) // 50, 12), replace=False)
    for name in ("logp_old", "logp_theta"):
        columns[name][chosen] -= 3


def _tail(world: World, columns: dict[str, np.ndarray]) -> None:
    doubt = np.flatnonzero(columns["logp_mu"] < -0.01)
    chosen = world.rng.choice(doubt, max(len(doubt) // 400, 3), replace=False)
    size = float(np.abs((columns["logp_old"] - columns["logp_mu"])[doubt]).sum()) / len(chosen)
    columns["logp_old"][chosen] -= 1.5 * size + 1
    columns["logp_theta"][chosen] -= 1.5 * size + 1


def _no_advantage(world: World, columns: dict[str, np.ndarray]) -> None:
    columns["advantage"][:] = 0


def _by_micro_batch(world: World, columns: dict[str, np.ndarray]) -> None:
    micro = world.trajectory // 6
    columns["loss_weight"] = (1 / (np.bincount(micro)[micro] * (micro.max() + 1))).astype(np.float32)


def _no_old(world: World, columns: dict[str, np.ndarray]) -> None:
    del columns["logp_old"]


def _twice(setting: Setting) -> list[Batch]:
    world = make_world(setting)
    columns = world.columns()
    again = columns | {"trainer_version": columns["trainer_version"] + 1}
    return [world.batch(columns, source="step 1"), world.batch(again, source="step 2")]


def _order(setting: Setting) -> list[Batch]:
    one, two = make_world(setting), make_world(replace(setting, seed=setting.seed + 10_000))
    two.prompts = one.prompts
    return [one.batch(one.columns(), source="seed 1"), two.batch(two.columns(), source="seed 2")]


FAULTS: Final = (
    Fault("ratio-is-one", "OLD is recomputed with the weights of the update", _old_is("logp_theta"), "mixed"),
    Fault("old-is-mu", "the engine's log-probs are taken for OLD", _old_is("logp_mu")),
    Fault("old-is-theta", "OLD is recomputed with the weights of the update", _old_is("logp_theta"), "far"),
    Fault("old-of-another-version", "OLD is of the weights at arrival, before several steps", _changed(_of_arrival), "mixed"),
    Fault("missing-old", "there is no OLD", _changed(_no_old), "mixed"),
    Fault("clip-never-acts", "clip and masks keep all tokens", _changed(_keep_all), "far"),
    Fault("unbounded-negative", "ratios of tokens with A < 0 are not bounded", _changed(_unbounded)),
    Fault("zero-logprobs", "0.0 stands for missing log-probs in three segments", _changed(_placeholder)),
    Fault("impossible-logprobs", "four log-probs are positive, NaN or -inf", _changed(_impossible)),
    Fault("missing-logprobs", "two segments have no log-probs", _missing),
    Fault("shifted-by-one", "log-probs of mu stand one token off", _changed(_shift)),
    Fault("versions-missing", "two segments have no version", _changed(_unlabelled)),
    Fault("versions-impossible", "all labels are one version ahead", _changed(_ahead), "mixed"),
    Fault("version-per-group", "a group's oldest version labels all its tokens", _relabelled(late=False), "mixed"),
    Fault("labels-late", "labels are one request late", _relabelled(late=True), "far"),
    Fault("mean-r-d", "the engine samples from the top 95%", _resampled(_top_p), "on-policy"),
    Fault("mean-r-d", "the engine reports raw log-probs", _raw, "on-policy"),
    Fault("stale-cache", "keys and values of older weights are kept", _resampled(_cache), "far"),
    Fault("jump-at-borders", "another context at the first token of a segment", _resampled(_border)),
    Fault("confident-disagreement", "2% of the engine's certain tokens are denied", _changed(_denied)),
    Fault("few-tokens", "1 token in 400 holds most of the disagreement", _changed(_tail)),
    Fault("zero-advantages", "advantages are lost", _changed(_no_advantage)),
    Fault("wrong-denominator", "each micro-batch has its own denominator", _changed(_by_micro_batch)),
    Fault("trained-twice", "one batch in two updates", _twice),
    Fault("same-order", "two seeds have one order of prompts", _order),
)  # fmt: skip
