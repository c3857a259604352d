"""The report while a run goes on: written after the first update, seldom afterwards, and never over the last one."""

import time

from oldlogits.record.events import Updated, Warned
from oldlogits.record.report.follow import ReportFollower

from ..waiting import HUNG_S


def updated(version):
    return Updated(version=version, metrics={}, staleness_counts={})


def wait_for(happened):
    deadline = time.monotonic() + HUNG_S
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_report_is_there_after_the_first_update_and_written_again_no_sooner_than_asked(fake_run):
    path = fake_run(2)
    report = path / "report.html"
    report.unlink(missing_ok=True)
    follower = ReportFollower(path, every_s=3600.0)
    follower.emit(Warned(version=0, name="a", message="nothing was updated yet", figures={}))
    assert follower._writer is None
    follower.emit(updated(1))
    wait_for(report.exists)
    follower._writer.wait(HUNG_S)
    report.unlink()
    for version in (2, 3):
        follower.emit(updated(version))
    assert follower._writer is None, "an hour has not gone by"
    follower.close()


def test_what_is_being_written_when_the_run_ends_does_not_replace_its_last_report(fake_run):
    path = fake_run(2)
    follower = ReportFollower(path)
    follower.emit(updated(1))
    writer = follower._writer
    follower.close()
    assert writer.poll() is not None
    follower.close()
