"""What processes are called in the system's list."""

import subprocess
import sys
from pathlib import Path

import pytest

SAY = "import sys; from oldlogits.core.processes import name_process; name_process(sys.argv[1])"


@pytest.mark.skipif(not Path("/proc/self/comm").exists(), reason="this system lists no names that a process may change")
@pytest.mark.parametrize("kind, listed", [("engine", "oldlogits-engin"), ("x", "oldlogits-x")])
def test_a_process_is_listed_under_what_it_does(kind, listed):
    read = f"{SAY}; print(open('/proc/self/comm').read().strip())"
    assert subprocess.run([sys.executable, "-c", read, kind], capture_output=True, text=True).stdout.strip() == listed
