"""How weights reach the nodes of a cluster: each once, whatever runs on it; and a store for those that join or are behind."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from oldlogits.backends.packed import pack, unpack
from oldlogits.backends.ray import actors, cluster
from oldlogits.backends.ray.cluster import Actor, ClusterError, Ref, fetch
from oldlogits.core.errors import OldLogitsError, WorkerDiedError
from oldlogits.core.server import ServerFailedError, SharedWeights
from oldlogits.core.weights import PolicyVersion, WeightUpdate


class ClusterWeights:
    """Brings weights to the nodes: each gets an update once, whatever runs on it; a `WeightTransport`.

    The store is the `NodeWeightCache` beside the controller: it takes every update, and gives its whole copy to a node that is
    new or behind, so that the trainer is not asked.
    """

    def __init__(self) -> None:
        self._store = _weight_cache(cluster.node_id())
        self._nodes: dict[str, _Node] = {}
        self._version: PolicyVersion = -1
        self._last: tuple[WeightUpdate, Ref] | None = None

    @property
    def num_copies(self) -> int:
        """The store's, and one a node."""
        return 1 + len(self._nodes)

    async def sent(self, weights: Ref) -> WeightUpdate:
        """The update behind a reference, over the memory of the object store."""
        try:
            update = unpack(await fetch(weights))
        except ClusterError as error:
            raise _lost(error) from error
        self._last = (update, weights)
        return update

    def reference(self, update: WeightUpdate) -> Ref:
        """What is passed to actors in place of an update."""
        if self._last is None or self._last[0] is not update:
            self._last = (update, cluster.put(pack(update)))
        return self._last[1]

    async def take(self, update: WeightUpdate, version: PolicyVersion) -> SharedWeights:
        """Bring the store and every node to a version; nodes that fail are supplied when their servers ask."""
        weights = self.reference(update)
        try:
            await fetch(self._store.call("take", weights, version))
        except ClusterError as error:
            raise _lost(error) from error
        self._version = version
        await asyncio.gather(*(node.take(weights, version) for node in self._nodes.values()))
        return SharedWeights(path=Path(), version=version)  # each node has a path of its own

    async def path(self, node_id: str) -> str:
        """Return the file of a node that holds the newest version; `ServerFailedError`: the node does not take it."""
        node = self._node(node_id)
        async with node.lock:
            if node.version != self._version:
                try:
                    await node.take(self._store.call("full"), self._version)
                except ClusterError as error:
                    raise ServerFailedError(f"the store of weights ended: {error}") from error
            if node.version != self._version:
                del self._nodes[node_id]  # its cache ended: the next look makes another
                raise ServerFailedError("its node did not take the weights")
            return str(node.path)

    async def share(self, node_id: str, text: str) -> Path:
        """Write a text on a node where weights would be."""
        node = self._node(node_id)
        try:
            return cast(Path, await fetch(node.cache.call("share", text)))
        except ClusterError as error:
            self._nodes.pop(node_id, None)
            raise ServerFailedError(f"its node does not answer: {error}") from error

    def _node(self, node_id: str) -> _Node:
        if node_id not in self._nodes:
            self._nodes[node_id] = _Node(cache=_weight_cache(node_id))
        return self._nodes[node_id]

    def close(self) -> None:
        """Leave no file."""
        caches = [self._store, *(node.cache for node in self._nodes.values())]
        cluster.wait([cache.call("close") for cache in caches], timeout_s=5.0)


@dataclass(slots=True, kw_only=True, eq=False)
class _Node:
    """What a node holds."""

    cache: Actor
    version: PolicyVersion = -1
    path: Path | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def take(self, weights: Ref, version: PolicyVersion) -> None:
        """Take an update; after a failure it is behind."""
        try:
            self.path = await fetch(self.cache.call("take", weights, version))
        except (ClusterError, OldLogitsError):
            self.version = -1
        else:
            self.version = version


def _weight_cache(node_id: str) -> Actor:
    return Actor(actors.NodeWeightCache, (), place=cluster.on_node(node_id))


def _lost(error: Exception) -> WorkerDiedError:
    return WorkerDiedError(
        "weights were lost on their way",
        got=str(error).strip().splitlines()[0],
        allowed="a trainer and a store that run until the end of the run",
        fix="look for a lost node or an object store that is too small; go on with --resume from the last checkpoint",
    )
