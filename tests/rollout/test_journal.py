"""The journal of rollouts: what its records add up to, and a disk that takes nothing more."""

import pytest

from oldlogits.core.errors import RunWriteError
from oldlogits.core.trajectory import Context, Sampled
from oldlogits.rollout.journal.journal import Journal
from oldlogits.rollout.journal.progress import Progress
from oldlogits.rollout.journal.records import Admitted, Ended, Grew, Running

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


def test_an_episode_that_ended_with_a_turn_that_was_known_whole_holds_it():
    """An engine may tell a whole turn while it is paused; a run that goes on samples nothing of it, and reports nothing."""
    prompt = Context(token_ids=(1, 2))
    turn = Sampled(token_ids=(7, 8), logp_mu=(-0.5, -0.25), version=3, kv="fresh", temperature=1.0)
    progress = Progress()
    for record in (
        Admitted(group="g000000", row=0, version=3, size=2),
        Grew(episode="g000000.0", segments=(prompt,)),
        Running(episode="g000000.0", sampled=(turn,)),
        Ended(episode="g000000.0", reward=1.0, stop_reason="done"),
    ):
        assert progress.apply(record)
    trajectory = progress.groups["g000000"].episodes["g000000.0"].trajectory("g000000.0", "g000000")
    assert trajectory.segments == (prompt, turn)
    again = Progress()
    assert all(again.apply(record) for record in progress.records())
    assert again.groups == progress.groups
