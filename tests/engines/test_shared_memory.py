"""Files of weights in shared memory: those that a killed process left are removed, and no others."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from oldlogits.engines.shared_memory import shared_file, unshare, unshare_ended

LEAVE_A_FILE = """
import os, signal
from oldlogits.engines.shared_memory import shared_file
print(shared_file(1), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_what_a_killed_process_left_is_removed_and_nothing_else():
    killed = subprocess.run([sys.executable, "-c", LEAVE_A_FILE], capture_output=True, text=True, check=False)
    left, own = Path(killed.stdout.strip()), shared_file(1)
    assert left.exists()
    _, pid, machine, rest = left.name.split("-", 3)
    elsewhere = left.with_name(f"oldlogits-{pid}-{int(machine) + 1}-{rest}")
    elsewhere.touch()
    unshare_ended()
    assert not left.exists()
    assert own.exists(), "of a process that lives"
    assert elsewhere.exists(), "of a process that cannot be seen from here"
    elsewhere.unlink()
    unshare(os.getpid())
    assert not own.exists()
