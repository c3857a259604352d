"""The journal of rollouts on a disk that takes nothing more."""

import pytest

from oldlogits.core.errors import RunWriteError
from oldlogits.rollout.journal.journal import Journal
from oldlogits.rollout.journal.progress import Progress
from oldlogits.rollout.journal.records import Admitted

from ..waiting import wait_until


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_is_told_to_whoever_calls_next_and_to_nobody_else(tmp_path):
    (tmp_path / "000000.jsonl").symlink_to("/dev/full")
    journal = Journal(tmp_path, Progress())

    def is_told():
        try:
            journal.note(Admitted(group="g000000", row=0, version=0, size=2))
        except RunWriteError as error:
            return error.got == "No space left on device"
        return False

    wait_until(is_told, "an error")
    journal.close()
