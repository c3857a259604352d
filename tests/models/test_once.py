"""What several threads ask for at the same time is made once, and nobody waits for another one's."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from oldlogits.models.chat.once import Once

from ..waiting import HUNG_S


def test_whoever_asks_for_what_is_being_made_gets_the_same_and_others_do_not_wait():
    begun, may_end, made = threading.Event(), threading.Event(), []

    def make(key):
        made.append(key)
        if key == "slow":
            begun.set()
            assert may_end.wait(HUNG_S)
        return [key]

    once = Once(make, most=4)
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(once.get, "slow")
        assert begun.wait(HUNG_S)
        second = pool.submit(once.get, "slow")
        assert pool.submit(once.get, "quick").result(HUNG_S) == ["quick"]
        may_end.set()
        assert first.result(HUNG_S) is second.result(HUNG_S)
    assert made == ["slow", "quick"]


def test_the_values_asked_for_last_are_kept_and_an_error_is_not():
    made = []

    def make(key):
        made.append(key)
        if made.count("bad") == 1 and key == "bad":
            raise ValueError("bad")
        return key

    once = Once(make, most=2)
    with pytest.raises(ValueError, match="bad"):
        once.get("bad")
    assert [once.get(key) for key in ("bad", "a", "bad", "b", "bad", "a")] == ["bad", "a", "bad", "b", "bad", "a"]
    assert made == ["bad", "bad", "a", "b", "a"], "b took the place of a"
