"""One update of the product's trainer, with each route to the proximal policy's log-probs."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.update.batch import Size, Trajectories
from benchmarks.update.plain import EPS_HIGH, EPS_LOW, LR
from oldlogits.batch.collate import TokenBatch, collate
from oldlogits.config.load import config_from_table
from oldlogits.core.policies import ASYNC, OLD
from oldlogits.core.scoring import Scored
from oldlogits.core.trajectory import Context, Sampled, Trajectory, TrajectoryGroup
from oldlogits.run.specs import trainer_spec
from oldlogits.train.trainer import Trainer

ROUTES: Final = {
    "none": ("ppo_clip_train_infer", "none", 1),
    "arrival": ("decoupled_async", "arrival", 1),
    "exact, 1 version": ("decoupled_exact", "snapshot", 1),
    "exact, 2 versions": ("decoupled_exact", "snapshot", 2),
    "exact, 4 versions": ("decoupled_exact", "snapshot", 4),
}
"""The variant, the source, and the versions, older than the trainer's, that have sampled each trajectory one after another."""


def our_update(route: str, folder: Path, size: Size) -> Callable[[], Callable[[], None]]:
    """Make a trainer; each call of what is returned prepares one update, which is then made."""
    variant, source, num_versions = ROUTES[route]
    config = config_from_table(
        {
            "variant": variant,
            "max_staleness": max(4, num_versions),
            "model": {"path": str(folder / "model")},
            "env": {"max_episode_tokens": size.longest},
            "objective": {"eps_low": EPS_LOW, "eps_high": EPS_HIGH},
            "proximal": {"source": source},
            "trainer": {"lr": LR, "warmup_steps": 0, "minibatches_per_update": 1, "device": "cpu"},
        }
    )
    trainer = Trainer(trainer_spec(config), folder / "model", [1, 2, 3, 4, 5])
    trajectories = Trajectories.load(folder / "batch.npz")
    trainer.publish()
    for _ in range(num_versions):  # so many are there before the first update that counts
        _update(trainer, route, batch_of(trajectories, size, trainer.version, 0))

    def prepare() -> Callable[[], None]:
        batch = batch_of(trajectories, size, trainer.version, num_versions)
        return lambda: _update(trainer, route, batch)

    return prepare


def _update(trainer: Trainer, route: str, batch: TokenBatch) -> None:
    trainer.put_batch(batch)
    trainer.train(_scored(trainer, route, batch))
    trainer.publish()
    trainer.retain(trainer.version - max(num for _, _, num in ROUTES.values()))


def _scored(trainer: Trainer, route: str, batch: TokenBatch) -> Scored | None:
    """Ask for log-probs as the route's source does."""
    versions = batch.version[batch.loss_mask]
    everything = np.arange(len(versions))
    if route == "none":
        return None
    if route == "arrival":
        values, policy = trainer.scorer.score(everything, None), ASYNC
        return Scored(policy=policy, values=values, computed_at=np.full_like(versions, trainer.version), num_switches=1)
    values = np.zeros(len(versions), np.float32)
    for version in (distinct := np.unique(versions)):
        tokens = everything[versions == version]
        values[tokens] = trainer.scorer.score(tokens, int(version))
    return Scored(policy=OLD, values=values, computed_at=versions, num_switches=len(distinct))


def batch_of(trajectories: Trajectories, size: Size, version: int, num_versions: int) -> TokenBatch:
    """Collate: the turns of a trajectory are of the last `num_versions` versions, ascending; 0: all of the live one."""
    members: list[Trajectory] = []
    for i, (ids, sampled) in enumerate(trajectories.pieces):
        cuts = [0, *(np.flatnonzero(np.diff(sampled)) + 1).tolist(), len(ids)]
        spans = list(pairwise(cuts))
        oldest = version - num_versions
        segments: list[Context | Sampled] = []
        for start, stop in spans:
            tokens = tuple(map(int, ids[start:stop]))
            at = oldest + (stop - 1) * num_versions // len(ids) if num_versions else version
            segments.append(_turn(tokens, at, size) if sampled[start] else Context(token_ids=tokens))
        group = f"g{i // size.members}"
        members.append(
            Trajectory(id=f"{group}.{i}", group_id=group, segments=tuple(segments), reward=float(i % 2), stop_reason="done")
        )
    groups = [
        TrajectoryGroup(id=f"g{g}", trajectories=tuple(members[g * size.members : (g + 1) * size.members]))
        for g in range(size.groups)
    ]
    advantages: NDArray[np.float32] = trajectories.advantages
    return collate(groups, advantages.tolist(), num_steps=1)


def _turn(tokens: tuple[int, ...], version: int, size: Size) -> Sampled:
    """A turn whose tokens are as probable as the random model finds any."""
    logp = -float(np.log(size.vocabulary))
    return Sampled(token_ids=tokens, logp_mu=(logp,) * len(tokens), version=version, kv="fresh", temperature=1.0)
