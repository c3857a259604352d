"""Signs of life of a rank, as long as it lives and no longer."""

import subprocess
import sys

import pytest

from ..waiting import HUNG_S

BEAT_AND_END = """
import time
import torch.distributed as dist
from oldlogits.backends.torchrun import rendezvous
from oldlogits.backends.torchrun.launch import Launch

store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
rendezvous.BEAT_S = 0.0  # at every moment a sign of life is on its way, also at the last
launch = Launch(rank=0, num_ranks=2, host="127.0.0.1", port=store.port, attempt=0)
mine, other = rendezvous.Rendezvous(launch), rendezvous.Rendezvous(launch)
mine.beat()
ends = time.monotonic() + 600
while other._beat(0) < 10 and time.monotonic() < ends:
    time.sleep(0.01)
print(other._beat(0) >= 10)
"""


@pytest.mark.slow
def test_a_process_that_gives_signs_of_life_ends_in_order():
    for _ in range(3):
        words = [sys.executable, "-c", BEAT_AND_END]
        ended = subprocess.run(words, capture_output=True, text=True, timeout=HUNG_S, check=False)
        assert (ended.returncode, ended.stdout.strip()) == (0, "True"), ended.stderr
