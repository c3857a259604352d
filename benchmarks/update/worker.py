"""A contender in a process of its own: makes an update for each line that it reads, and says what it took.

    python -m benchmarks.update.worker CONTENDER SIZE FOLDER

CPU seconds of the process, one line of JSON an update; at the end of its input the peak of its memory in KiB.
"""

from __future__ import annotations

import json
import re
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.update.batch import SIZES, Size


def contender(name: str, folder: Path, size: Size) -> Callable[[], Callable[[], None]]:
    """Find a contender by its name; what it needs is imported only here."""
    if name == "plain":
        from benchmarks.update.plain import plain_update

        return plain_update(folder, size)
    if name == "trl":
        from benchmarks.update.trl_step import trl_update

        return trl_update(folder, size)
    from benchmarks.update.ours import our_update

    return our_update(name, folder, size)


def main() -> None:
    """Make updates until the input ends."""
    name, size, folder = sys.argv[1], SIZES[sys.argv[2]], Path(sys.argv[3])
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    prepare = contender(name, folder, size)
    prepare()()  # the first one fills caches, and compiles what is compiled
    print(json.dumps({"is_ready": True}), flush=True)
    for _ in sys.stdin:
        update = prepare()
        started = time.process_time()
        update()
        print(json.dumps({"cpu_s": time.process_time() - started}), flush=True)
    peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())  # of this program, not of what has started it
    print(json.dumps({"peak_kib": int(peak[1]) if peak else 0}), flush=True)


if __name__ == "__main__":
    main()
