"""Trajectories and batches made by hand."""

from __future__ import annotations

from collections.abc import Sequence

from oldlogits.batch.collate import TokenBatch, collate
from oldlogits.core.trajectory import KV, Context, Sampled, Trajectory, TrajectoryGroup


def sampled(
    ids: Sequence[int], version: int = 0, *, logp: float | Sequence[float] = -1.0, kv: KV = "fresh", temperature: float = 1.0
) -> Sampled:
    logps = (logp,) * len(ids) if isinstance(logp, float) else tuple(logp)
    return Sampled(token_ids=tuple(ids), logp_mu=logps, version=version, kv=kv, temperature=temperature)


def trajectory(
    *segments: Context | Sampled | Sequence[int], id: str = "g0.0", group: str = "g0", reward: float = 0.0
) -> Trajectory:
    """Bare token ids are context."""
    written = tuple(s if isinstance(s, Context | Sampled) else Context(token_ids=tuple(s)) for s in segments)
    return Trajectory(id=id, group_id=group, segments=written, reward=reward, stop_reason="done")


def batch_of(
    trajectories: Sequence[Trajectory], advantages: Sequence[float] | None = None, *, num_steps: int = 1
) -> TokenBatch:
    """A batch; trajectories of one `group_id` that stand side by side are a group."""
    groups: list[TrajectoryGroup] = []
    for one in trajectories:
        if groups and groups[-1].id == one.group_id:
            groups[-1] = TrajectoryGroup(id=one.group_id, trajectories=(*groups[-1].trajectories, one))
        else:
            groups.append(TrajectoryGroup(id=one.group_id, trajectories=(one,)))
    return collate(groups, advantages if advantages is not None else [1.0] * len(trajectories), num_steps=num_steps)
