"""The embedded engine as a server: `oldlogits serve` speaks vLLM's routes, and is started by a command line of its own."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import ClassVar

from oldlogits.core.engine import EngineSpec
from oldlogits.core.server import LaunchSpec
from oldlogits.engines.protocols.vllm import VllmProtocol


class EmbeddedProtocol(VllmProtocol):
    """Speaks to `oldlogits serve`."""

    numerics: ClassVar[frozenset[str]] = VllmProtocol.numerics | {"fp8_dynamic"}
    uses_gpu: ClassVar[bool] = False
    needs: ClassVar[str] = "uvicorn"

    @classmethod
    def check(cls, spec: EngineSpec) -> None:
        """Refuse what the embedded decoder does not compute."""
        from oldlogits.engines.embedded.model_folder import decoder_config

        decoder_config(spec)

    @classmethod
    def command(cls, spec: LaunchSpec, port: int) -> list[str]:
        """The command line of `oldlogits serve`."""
        e = spec.engine
        return [
            *(spec.servers.python or sys.executable, "-m", "oldlogits", "serve", e.model_path),
            *("--host", spec.address, "--port", str(port), "--seed", str(e.seed)),
            *("--max-num-seqs", str(e.max_num_seqs), "--max-context", str(e.max_context)),
            *("--numerics", e.numerics, "--adapter-scale", str(e.adapter_scale), "--device", e.device),
            *(["--enable-return-routed-experts"] if e.returns_routing else []),
            *spec.servers.flags,
        ]

    @classmethod
    def environment(cls, token: str) -> Mapping[str, str]:
        """The token."""
        return {"OLDLOGITS_TOKEN": token}
