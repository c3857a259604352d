"""Starts a server of its own for a run, on this machine: vLLM, or the embedded engine behind the same routes."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from oldlogits.engines.http import reaper as leash
from oldlogits.engines.http.client import Server, ServerFailedError, transfer_flags
from oldlogits.engines.protocols.wide_heads import widening_of, write_wide

_LAST_WORDS: Final = 2000
"""Characters of a server's messages that an error quotes."""
_DTYPES: Final[Mapping[str, str]] = {"bf16": "bfloat16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchSpec:
    """What a server is started with.

    Args:
        server: Which one.
        model_path: A Hugging Face folder.
        numerics: The engine's.
        max_num_seqs: Sequences decoded at the same time.
        max_context: The most tokens of one sequence.
        flags: Further ones of the server's own.
        python: The interpreter that has it; empty: this one.
        log_folder: Where its messages go.
        seed: Of the sampler.
        adapter_scale: As in `EngineSpec`.
        address: That it listens on.
    """

    server: Literal["vllm", "embedded"]
    model_path: str
    numerics: str
    max_num_seqs: int
    max_context: int
    flags: Sequence[str]
    python: str
    log_folder: Path
    seed: int
    adapter_scale: float = 0.0
    address: str = "127.0.0.1"

    def command(self, port: int) -> list[str]:
        """The command line."""
        python = self.python or sys.executable
        where = ["--host", self.address, "--port", str(port), "--seed", str(self.seed)]
        if self.server == "embedded":
            size = ["--max-num-seqs", str(self.max_num_seqs), "--max-context", str(self.max_context)]
            weights = ["--numerics", self.numerics, "--adapter-scale", str(self.adapter_scale)]
            return [python, "-m", "oldlogits", "serve", self.model_path, *where, *size, *weights, *self.flags]
        model, widening = self.model_path, widening_of(Path(self.model_path))
        if widening is not None:
            model = str(self.log_folder / "model")
            write_wide(Path(self.model_path), widening, Path(model))
        own = {"oldlogits_numerics": self.numerics, "oldlogits_head_dim": widening.narrow if widening else 0}
        if self.adapter_scale:
            own |= {"oldlogits_adapter_scale": self.adapter_scale, "oldlogits_base": self.model_path}
        return [
            *(python, "-m", "vllm.entrypoints.openai.api_server", "--model", model, *where),
            *("--max-num-seqs", str(self.max_num_seqs), "--max-model-len", str(self.max_context)),
            *("--dtype", _DTYPES.get(self.numerics, "float32"), "--additional-config", json.dumps(own)),
            *("--logprobs-mode", "processed_logprobs", "--enable-scale-out"),
            *(*transfer_flags(), *self.flags),
        ]

    def environment(self, token: str) -> dict[str, str]:
        """Variables of its process: this package importable, the routes of weight updates, no downloads."""
        defaults = {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
        own = {
            "PYTHONPATH": os.pathsep.join(self._search_path()),
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_API_KEY": token,
            "OLDLOGITS_TOKEN": token,
            "HF_HUB_OFFLINE": "1",
        }
        return {**defaults, **os.environ, **own}

    def _search_path(self) -> list[str]:
        """Where its interpreter looks: if it is another one, first in a folder that holds this package and nothing else."""
        inherited = list(filter(None, [os.environ.get("PYTHONPATH")]))
        if not self.python:
            return inherited
        folder = self.log_folder / "python"
        folder.mkdir(parents=True, exist_ok=True)
        link = folder / "oldlogits"
        if not link.is_symlink():
            link.symlink_to(Path(__file__).parents[1], target_is_directory=True)
        return [str(folder.resolve()), *inherited]


class Launched:
    """A server's process.

    Args:
        spec: What to start.
        name: Of its log.
    """

    def __init__(self, spec: LaunchSpec, name: str) -> None:
        self._spec = spec
        self.log = spec.log_folder / f"{name}.log"
        self.port, self.token = _free_port(spec.address), secrets.token_hex(16)
        self._process = self._start()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://{self._spec.address}:{self.port}"

    @property
    def where(self) -> str:
        """Its log."""
        return str(self.log)

    @property
    def pid(self) -> int:
        """Its process id, which is that of its group, too."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it lives."""
        return self._process.poll()

    async def ready(self, server: Server, start_s: float) -> None:
        """Wait until it answers.

        Raises:
            ServerFailedError: It ended, or takes longer than `start_s`.
        """
        ends = time.monotonic() + start_s
        while True:
            if self.exit_code is not None:
                raise ServerFailedError(
                    f"it ended with exit code {self.exit_code}; the end of {self.log}: {self._last_words()}"
                )
            try:
                await server.check_health(2.0)
                return
            except ServerFailedError as failure:
                if time.monotonic() > ends:
                    raise ServerFailedError(f"it is not ready after {start_s:g} s; see {self.log}") from failure
            await asyncio.sleep(0.2)

    def restart(self) -> None:
        """End what is left of it and start it again."""
        self.close()
        self._process = self._start()

    def close(self) -> None:
        """End it and whatever it has started."""
        leash.end_group(self._process.pid)  # its weights are copies: nothing is lost
        self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()

    def _start(self) -> subprocess.Popen[bytes]:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, leash.__file__, *self._spec.command(self.port)],
                env=self._spec.environment(self.token),
                stdin=subprocess.PIPE,  # the leash: it ends with this process, however that ends
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is the controller's to handle; and it ends with all of its children
            )

    def _last_words(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")[-_LAST_WORDS:].strip()


def _free_port(address: str) -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        port: int = probe.getsockname()[1]
        return port
