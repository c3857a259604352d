"""The batches of a neutral token table (docs/token-table.md), which another trainer wrote: one for each `trainer_version`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from oldlogits.batch.collate import TokenBatch
from oldlogits.batch.token_table import TokenTable
from oldlogits.core.errors import ReplayError
from oldlogits.replay.batches import RecordedBatch


def with_trainer_version(table: TokenTable) -> TokenTable:
    """Let a table without any `trainer_version` be one update, which began with the newest version of its tokens."""
    versions, mask = table.version, table.mask
    if not mask.any() or (table.trainer_version[mask] >= 0).any() or (versions[mask] < 0).any():
        return table
    newest = np.where(mask, versions[mask].max(), -1).astype(np.int32)
    return replace(table, trainer_version=newest)


def table_batches(table: TokenTable, name: str) -> list[RecordedBatch]:
    """Read the batches of a table, in the order of their `trainer_version`; `name` is the file's, for errors.

    Raises:
        ReplayError: What an update reads is missing, which the error names with its remedy.
    """
    mask, trajectory = table.mask, table.trajectory
    _check_complete(table, name)
    of_trained = table.trainer_version[mask]
    update = np.full(len(table.trajectories), -1)
    update[trajectory[mask]] = of_trained
    if (update[trajectory[mask]] != of_trained).any():
        row = int(np.flatnonzero(mask)[np.argmax(update[trajectory[mask]] != of_trained)])
        raise _absent(
            name, "a trajectory is of two updates", table.name_of(row), "give it another name in each update that trains it"
        )
    found = []
    for version in np.unique(of_trained).tolist():
        rows = np.flatnonzero((update == version)[trajectory])
        found.append(_batch(table, rows, name, version))
    return found


def _batch(table: TokenTable, rows: NDArray[np.intp], name: str, version: int) -> RecordedBatch:
    """Take the trajectories of one update; `rows` are their tokens."""
    codes, trajectory = np.unique(table.trajectory[rows], return_inverse=True)
    mask = table.mask[rows]
    lengths = np.bincount(trajectory)
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    last = np.zeros(len(codes), np.int64)
    last[trajectory[mask]] = np.flatnonzero(mask)  # of each trajectory a trained token
    assert table.advantage is not None, "checked"
    temperature = np.ones(len(rows), np.float32) if table.temperature is None else table.temperature[rows].copy()
    temperature[~mask] = 1
    batch = TokenBatch(
        token_ids=table.token_id[rows].astype(np.int64),
        temperature=temperature,
        starts=starts,
        loss_mask=mask,
        version=np.where(mask, table.version[rows], -1).astype(np.int64),
        logp_mu=np.where(mask, table.logp_mu[rows], 0).astype(np.float32),
        mixed_kv=np.zeros(len(rows), np.bool_),
        advantages=table.advantage[rows][last],
        rewards=np.zeros(len(codes), np.float32),
        step=np.zeros(len(codes), np.int64),
        trajectory_ids=tuple(table.trajectories[code] for code in codes.tolist()),
    )
    columns = {"token_id": table.token_id[rows][mask]}
    for column in ("logp_old", "logp_theta"):
        values = getattr(table, column)
        if values is not None:
            columns[column] = values[rows][mask]
    groups = _groups(table, rows[starts[:-1]])
    return RecordedBatch(name=name, batch=batch, groups=groups, version=version, columns=columns)


def _groups(table: TokenTable, first_rows: NDArray[np.int64]) -> tuple[str, ...]:
    """Name the group of each trajectory; one that has none is a group of its own."""
    own = [f"{code} by itself" for code in table.trajectory[first_rows].tolist()]
    codes = [-1] * len(own) if table.group is None else table.group[first_rows].tolist()
    return tuple(table.groups[code] if code >= 0 else name for code, name in zip(codes, own, strict=True))


def _check_complete(table: TokenTable, name: str) -> None:
    """Refuse a table that lacks what a forward pass, or a loss, reads. A recorded NaN is a value, which the loss leaves out."""
    mask, index = table.mask, table.index
    none, every = np.zeros(len(mask), np.bool_), np.ones(len(mask), np.bool_)
    lacks = {column: table.missing.get(column, none) for column in ("logp_mu", "logp_old", "temperature", "advantage")}
    lacks["advantage"] = every if table.advantage is None else lacks["advantage"]
    heat = table.temperature if table.temperature is not None else np.ones(len(mask), np.float32)
    advantage = table.advantage if table.advantage is not None else np.zeros(len(mask), np.float32)
    first = np.zeros(len(table.trajectories), np.int64)
    first[table.trajectory[mask][::-1]] = np.flatnonzero(mask)[::-1]  # of each trajectory the first trained token
    rules = (
        (
            index != np.arange(len(mask)) - table.starts[table.trajectory],
            "tokens before it are missing",
            "write the context too",
        ),
        (mask & (index == 0), "a first token is trained, which nothing predicts", "write its prompt, with mask = false"),
        (mask & (table.version < 0), "its version is missing", "write the version that sampled it, or 0"),
        (mask & (table.trainer_version < 0), "its trainer_version is missing", "write that of its update, or 0"),
        (
            mask & (table.version > table.trainer_version),
            "its version is newer than its trainer_version",
            "correct the versions",
        ),
        (mask & lacks["logp_mu"], "its logp_mu is missing", "let the engine return log-probs, and write them"),
        (mask & lacks["logp_old"], "its logp_old is missing", "write it for each trained token, or leave out the column"),
        (mask & lacks["temperature"], "its temperature is missing", "write it for each trained token; no column means 1"),
        (mask & np.isnan(heat), "its temperature is not a number", "write that of each trained token; no column means 1"),
        (mask & lacks["advantage"], "its advantage is missing", "write the advantage of each trained token"),
        (mask & ~np.isfinite(advantage), "its advantage is not finite", "look for the group whose rewards make it so"),
        (
            mask & (advantage != advantage[first[table.trajectory]]),
            "its advantage is not that of its trajectory's other tokens, and a replay has one for each trajectory",
            "write one advantage a trajectory; those of single tokens (GAE) cannot be replayed",
        ),
    )
    if not mask.any():
        raise _absent(name, "no token is trained", f"{len(mask)} tokens", "set mask = true where the loss trains a token")
    for wrong, what, fix in rules:
        if wrong.any():
            raise _absent(name, what, table.name_of(int(np.argmax(wrong))), fix)


def _absent(name: str, what: str, got: str, fix: str) -> ReplayError:
    return ReplayError(
        f"{name} does not hold all that an update reads: {what}",
        got=got,
        allowed="whole trajectories with mask, version, trainer_version, logp_mu and advantage of each trained token",
        fix=f"{fix} (docs/token-table.md)",
    )
