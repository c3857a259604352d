"""The desk with slow tools: the same desk, and how long it sleeps."""

from __future__ import annotations

import math
import statistics
from concurrent.futures import ThreadPoolExecutor

import pytest

from oldlogits.core.parser import Malformed, ToolCall
from oldlogits.envs.base import load_environment
from oldlogits.envs.parsers.plain import PlainParser
from oldlogits.envs.tools import bind, tool_names, tool_schemas
from order_desk import slow
from order_desk.clerk import oracle
from order_desk.environment import OrderDesk, judge
from order_desk.slow import Deck, SlowOrderDesk


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that would have been slept."""
    seconds: list[float] = []
    monkeypatch.setattr(slow.time, "sleep", seconds.append)
    return seconds


def test_it_has_the_tools_the_prompt_and_the_rows_of_the_desk():
    assert load_environment("desk_slow") is SlowOrderDesk
    assert tool_names(SlowOrderDesk) == tool_names(OrderDesk) == ("status", "age", "cancel", "refund", "transfer")
    assert tool_schemas(SlowOrderDesk) == tool_schemas(OrderDesk)
    assert SlowOrderDesk.system_prompt == OrderDesk.system_prompt
    assert SlowOrderDesk.make_row("train", 7) == OrderDesk.make_row("train", 7)


def test_an_episode_goes_as_at_the_desk_and_every_tool_call_sleeps(slept: list[float]):
    for index in range(40):
        row = OrderDesk.make_row("train", index)
        desk, clerk, before, num_calls = SlowOrderDesk(), oracle(), len(slept), 0
        seen: str | None = desk.reset(**row, latency_s=0.25)
        next(clerk)
        while seen is not None:
            text = clerk.send(seen)
            calls = PlainParser().parse(text)
            if not calls:
                seen = desk.reply(text)
                continue
            assert isinstance(calls[0], ToolCall)
            ready = bind(desk, *calls)
            assert not isinstance(ready, Malformed)
            seen, num_calls = str(ready()), num_calls + 1
        assert judge(desk).right
        assert len(slept) - before == num_calls
    assert {round(seconds / 0.25, 9) for seconds in slept} <= {round(latency, 9) for latency in Deck().latencies}


def test_the_latency_of_a_row_that_names_none_has_a_mean_of_a_second(slept: list[float]):
    desk = SlowOrderDesk()
    desk.reset(**OrderDesk.make_row("train", 0))
    for _ in range(2 * slow.DECK):
        desk.status("o10")
    assert 0.6 < statistics.fmean(slept) < 1.6  # the deck may have been begun by others


def test_a_deck_has_the_quantiles_of_a_log_normal_distribution_of_mean_one():
    latencies = Deck(size=2000, spread=1.0).latencies
    assert statistics.fmean(latencies) == pytest.approx(1.0)
    median, slowest = latencies[1000], latencies[1980]
    assert median == pytest.approx(math.exp(-0.5), rel=0.02)  # mean exp(1/2) of the median
    assert slowest / median == pytest.approx(math.exp(2.326), rel=0.02)  # the normal distribution's 99th percentile
    assert statistics.stdev(map(math.log, latencies)) == pytest.approx(1.0, rel=0.01)


def test_every_latency_of_a_deck_is_drawn_once_before_any_comes_again():
    deck = Deck(size=16)
    rounds = [[deck.draw() for _ in range(16)] for _ in range(3)]
    assert all(sorted(drawn) == list(deck.latencies) for drawn in rounds)
    assert rounds[0] != rounds[1]


def test_threads_share_a_deck():
    deck = Deck(size=32)
    with ThreadPoolExecutor(8) as pool:
        drawn = list(pool.map(lambda _: deck.draw(), range(32 * 50)))
    assert sorted(drawn) == sorted(deck.latencies * 50)
