"""The versions of a store on disk: one full copy, and the patches that lead from it to older and to newer versions.

copy of version c | patches to c, c-1, ... (what older versions were needed when the log was written) | to c+1, c+2, ...
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from oldlogits.core.errors import LogDamagedError, LogWriteError
from oldlogits.core.weights import PolicyVersion
from oldlogits.versions.chain import Chain, Link
from oldlogits.versions.defer_sigint import defer_sigint
from oldlogits.versions.disk.log import VersionLog
from oldlogits.versions.disk.log_format import Kind, Payload
from oldlogits.versions.disk.records import copy_payload, fingerprint, patch_payload, read_copy, read_step
from oldlogits.versions.patches.flat import FlatWeights


class Disk:
    """Writes into a log, and reads from it, what a store needs to be opened again.

    Attributes:
        fingerprints: What identifies each frozen tensor, by name; no bits of these are written.
    """

    def __init__(self, log: VersionLog, folder: Path) -> None:
        self.log, self._folder = log, folder
        self.fingerprints: Mapping[str, str] = {}
        self._fixed_bytes = 0  # of the log: all but patches

    def read(
        self, frozen: Mapping[str, Tensor], device: torch.device | str | None
    ) -> tuple[PolicyVersion, FlatWeights, list[Link], PolicyVersion]:
        """Read the version of the full copy, its bits, all links oldest first, and the oldest version that is needed."""
        records = self.log.records
        if not records or records[0].kind is not Kind.COPY:
            raise self._wrong("it does not begin with a full copy")
        flat, self.fingerprints = read_copy(self.log.read(records[0]), frozen, device)
        patches = sorted((record for record in records if record.kind is Kind.PATCH), key=lambda record: record.version)
        links = [Link(step=read_step(self.log.read(r))[0], target=r.version, record=r) for r in patches]
        steps = [(link.step, link.target) for link in links]
        ends = {step.base: step.base_digest for step, _ in steps} | {target: step.target_digest for step, target in steps}
        joints = ((a.target == b.step.base and a.step.target_digest == b.step.base_digest) for a, b in pairwise(links))
        if not all(joints) or (links and ends.get(records[0].version) != flat.digest):
            raise self._wrong("its patches do not follow one another")
        self._fixed_bytes = self.log.num_bytes - sum(record.whole_bytes for record in patches)
        marks = [record.version for record in records if record.kind is Kind.RETAIN]
        return records[0].version, flat, links, max([min([records[0].version, *ends]), *marks])

    def begin(self, version: PolicyVersion, flat: FlatWeights) -> int:
        """Write the first version; returns the bytes written."""
        self.fingerprints = {name: fingerprint(name, tensor) for name, tensor in flat.frozen.items()}
        self.rewrite(version, flat, Chain())
        return self.log.num_bytes

    def append(self, link: Link, chain: Chain) -> int:
        """Write the newest link of the chain, wholly or not at all; returns the bytes written."""
        link.record = self.log.append(Kind.PATCH, link.target, patch_payload(link.step, chain.serialised(link)))
        return link.record.whole_bytes

    def drop(self, oldest: PolicyVersion, resident: PolicyVersion, flat: FlatWeights, chain: Chain) -> None:
        """Note that versions below `oldest` are no longer needed; write the log anew when most of it is of such."""
        live_bytes = sum(link.record.whole_bytes for link in chain.links if link.record is not None)
        try:
            if self.log.num_bytes - self._fixed_bytes - live_bytes > flat.num_bytes + live_bytes:
                self.rewrite(resident, flat, chain)
            else:
                self._fixed_bytes += self.log.append(Kind.RETAIN, oldest).whole_bytes
        except LogWriteError:  # the log stays as it is: it holds more than is needed, and no version depends on this
            return

    def rewrite(self, resident: PolicyVersion, flat: FlatWeights, chain: Chain) -> None:
        """Replace the log by one that holds the resident version and the chain, and nothing else, wholly or not at all."""
        older = [link for link in chain.links if link.target <= resident][::-1]
        newer = [link for link in chain.links if link.target > resident]

        def entries() -> Iterator[tuple[Kind, PolicyVersion, Payload]]:
            yield Kind.COPY, resident, copy_payload(flat, self.fingerprints)
            for link in (*older, *newer):
                yield Kind.PATCH, link.target, patch_payload(link.step, chain.serialised(link))

        with defer_sigint():
            copy, *patches = self.log.rewrite(entries())
            for link, record in zip((*older, *newer), patches, strict=True):
                link.record = record
            self._fixed_bytes = copy.end

    def _wrong(self, found: str) -> LogDamagedError:
        return LogDamagedError(
            f"the log of versions in {self._folder} leads to no version",
            got=found,
            allowed="one full copy and patches that follow one another",
            fix="restore the folder from a copy, or begin a new one",
        )
