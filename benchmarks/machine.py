"""What a measurement was made on."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

CPUINFO: Final = Path("/proc/cpuinfo")
FEATURES: Final = ("avx2", "bmi2", "avx512f", "avx512bw", "avx512vl", "avx512_vbmi2", "avx512_bf16", "amx_bf16", "asimd", "sve")
"""Vector instructions that the kernels can profit from, under the names of /proc/cpuinfo."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The machine, and what runs on it.

    Args:
        device: What was measured: the CPU's or the accelerator's name.
        features: Those of `FEATURES` that the CPU has; empty where the system does not tell.
        num_cores: Cores that this process may use; one thread of them is used.
        load: Mean number of runnable processes over the last minute, at the start; -1 where the system does not tell.
        fast_path: The kernels in use.
        software: Versions.
    """

    device: str
    features: tuple[str, ...]
    num_cores: int
    load: float
    fast_path: str
    software: str

    def __str__(self) -> str:
        """Two lines."""
        busy = "" if self.load < 0 else f", load {self.load:.1f}"
        features = " ".join(self.features) or "features unknown"
        return f"{self.device} ({features}), {self.num_cores} cores{busy}; {self.software}\nkernels: {self.fast_path}"


def this_machine(device: str, fast_path: str) -> Machine:
    """The machine that this process runs on."""
    facts = _cpu_facts(CPUINFO)
    flags = facts.get("flags", facts.get("Features", "")).split()
    name = facts.get("model name") or platform.processor() or platform.machine()
    affinity = getattr(os, "sched_getaffinity", None)  # not on every system
    cores = os.cpu_count() or 1
    return Machine(
        device=name if torch.device(device).type == "cpu" else torch.cuda.get_device_name(device),
        features=tuple(feature for feature in FEATURES if feature in flags),
        num_cores=len(affinity(0)) if affinity else cores,
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else -1.0,
        fast_path=fast_path,
        software=f"Python {platform.python_version()}, torch {torch.__version__}",
    )


def _cpu_facts(cpuinfo: Path) -> dict[str, str]:
    """The lines of the first processor, ``key : value``; nothing where the file does not exist."""
    if not cpuinfo.is_file():
        return {}
    first = cpuinfo.read_text(encoding="utf-8").split("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}
