"""What processes are called in the system's list, and how they ended."""

import multiprocessing
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from oldlogits.rpc.processes import exit_code

from ..waiting import HUNG_S

NUM_ASKING = 8
SAY = "import sys; from oldlogits.rpc.processes import name_process; name_process(sys.argv[1])"


@pytest.mark.skipif(not Path("/proc/self/comm").exists(), reason="this system lists no names that a process may change")
@pytest.mark.parametrize("kind, listed", [("engine", "oldlogits-engin"), ("x", "oldlogits-x")])
def test_a_process_is_listed_under_what_it_does(kind, listed):
    read = f"{SAY}; print(open('/proc/self/comm').read().strip())"
    assert subprocess.run([sys.executable, "-c", read, kind], capture_output=True, text=True).stdout.strip() == listed


def test_all_who_ask_while_a_process_ends_are_told_its_exit_code():
    context = multiprocessing.get_context("spawn")
    with ThreadPoolExecutor(NUM_ASKING) as threads:
        for _ in range(10):
            process = context.Process(target=signal.pause)
            process.start()
            asked = [threads.submit(exit_code, process, HUNG_S) for _ in range(NUM_ASKING)]
            os.kill(process.pid, signal.SIGKILL)
            assert [future.result(timeout=HUNG_S) for future in asked] == [-signal.SIGKILL] * NUM_ASKING


def test_a_process_that_goes_on_has_no_exit_code():
    process = multiprocessing.get_context("spawn").Process(target=signal.pause)
    process.start()
    assert exit_code(process, patience_s=0.05) is None
    process.kill()
    assert exit_code(process, HUNG_S) == -signal.SIGKILL
