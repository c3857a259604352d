"""A command that a reaper holds ends with who holds the reaper, and leaves nothing in shared memory."""

import os
import signal
import subprocess
import sys
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import pytest

from oldlogits.engines.http import reaper

from ..waiting import is_running, wait_until

WORK = """
import multiprocessing, time
from multiprocessing.shared_memory import SharedMemory

def hold(name):
    other = SharedMemory(name)
    print(name, flush=True)
    time.sleep(600)

if __name__ == "__main__":
    own = SharedMemory(create=True, size=1 << 16)
    lock = multiprocessing.get_context("spawn").Lock()
    child = multiprocessing.get_context("spawn").Process(target=hold, args=(own.name,))
    child.start()
    time.sleep(600)
"""

HOLDER = f"""
import os, subprocess, sys, time
command = [sys.executable, {reaper.__file__!r}, str(os.getpid()), sys.executable, sys.argv[1]]
process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
name = process.stdout.readline().strip()
if (forked := os.fork()) == 0:
    time.sleep(600)
print(process.pid, forked, name, flush=True)
time.sleep(600)
"""


def named():
    folder = Path("/dev/shm")
    return {path.name for path in folder.iterdir() if path.name.startswith(("psm_", "sem.mp-"))} if folder.exists() else set()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="this system does not list what a process has mapped")
@pytest.mark.parametrize("how", ["let go", "end"])
def test_a_group_leaves_nothing_in_shared_memory(tmp_path, how):
    (tmp_path / "work.py").write_text(WORK)
    other = SharedMemory(create=True, size=16)  # of a process outside
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "work.py")], stdout=subprocess.PIPE, text=True)
    group, forked, name = holder.stdout.readline().split()
    try:
        assert name in named()
        names = {path.name for path in reaper.mapped(int(group))}
        assert {name[:4] for name in names} == {"psm_", "sem."}
        if how == "end":
            reaper.end_group(int(group))
        else:
            holder.kill()
        wait_until(lambda: not is_running(int(group)), "the reaper ends")
        assert not names & named()
        assert other.name in named()
        assert is_running(int(forked)), "a fork of the holder keeps its pipes open"
    finally:
        reaper.end_group(int(group))
        os.kill(int(forked), signal.SIGKILL)
        holder.kill()
        holder.wait()
        holder.stdout.close()
        other.close()
        other.unlink()
