"""A wait in vain is an error, not a pass."""

import pytest

from .runs import after_updates, wait_for_updates
from .waiting import wait_until


def test_a_wait_ends_as_soon_as_it_holds_and_in_vain_it_says_what_it_waited_for():
    seen = []
    wait_until(lambda: seen.append(1) or len(seen) == 3, "three looks")
    assert len(seen) == 3
    with pytest.raises(TimeoutError, match=r"after 0\.05 s still not: pigs fly"):
        wait_until(lambda: False, "pigs fly", hung_s=0.05)


def test_updates_that_do_not_come_are_an_error(tmp_path):
    with pytest.raises(TimeoutError, match="has made 1 updates"):
        wait_for_updates(tmp_path, 1, hung_s=0.05)


def test_a_run_that_is_over_before_its_update_is_an_error_of_who_waited_for_it(tmp_path):
    acted = []
    thread = after_updates(tmp_path, 2, lambda: acted.append(1))
    with pytest.raises(AssertionError, match="the run was over after 0 updates, before 2"):
        thread.join()
    assert acted == []
