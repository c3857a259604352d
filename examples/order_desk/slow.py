"""The order desk with slow tools: each call sleeps first, as a tool waits for a server. For measurements of throughput."""

from __future__ import annotations

import functools
import math
import random
import statistics
import threading
import time
from collections.abc import Callable
from typing import Concatenate, Final, ParamSpec, TypeVar

from order_desk.data import OrderRow, WishRow
from order_desk.environment import OrderDesk

P = ParamSpec("P")
R = TypeVar("R")

SPREAD: Final = 1.0
"""Standard deviation of the log of a latency: the slowest hundredth of the calls takes ten times the median or more."""
DECK: Final = 64
"""Latencies that are drawn before one of them comes again."""


class Deck:
    """Equally likely latencies of mean 1, shuffled anew when all were drawn.

    They are the quantiles of a log-normal distribution. Each process has its own order, but all have slept the same after as
    many calls: what a measurement shows is not the luck of its draw.

    Args:
        size: How many.
        spread: Standard deviation of their logarithm, before they are cut to the middles of `size` equal parts.
    """

    def __init__(self, size: int = DECK, spread: float = SPREAD) -> None:
        normal = statistics.NormalDist(sigma=spread)
        quantiles = [math.exp(normal.inv_cdf((i + 0.5) / size)) for i in range(size)]
        mean = statistics.fmean(quantiles)
        self.latencies: Final = tuple(quantile / mean for quantile in quantiles)
        self._left: list[float] = []
        self._lock = threading.Lock()  # tools run in threads

    def draw(self) -> float:
        """The next latency, as a multiple of the mean."""
        with self._lock:
            if not self._left:
                self._left = random.sample(self.latencies, len(self.latencies))
            return self._left.pop()


_deck: Final = Deck()


def _slow(tool: Callable[Concatenate[SlowOrderDesk, P], R]) -> Callable[Concatenate[SlowOrderDesk, P], R]:
    @functools.wraps(tool)
    def call(self: SlowOrderDesk, /, *args: P.args, **kwargs: P.kwargs) -> R:
        time.sleep(self._latency_s * _deck.draw())
        return tool(self, *args, **kwargs)

    return call


class SlowOrderDesk(OrderDesk):  # noqa: D101
    # Players read the docstring, which is the policy: it is inherited.

    def reset(self, *, customer: str, orders: dict[str, OrderRow], wishes: list[WishRow], latency_s: float = 1.0) -> str:
        """A customer comes in; what they say first.

        Args:
            customer: Their name.
            orders: By number.
            wishes: What they want.
            latency_s: Mean seconds until a tool answers.
        """
        self._latency_s = latency_s
        return super().reset(customer=customer, orders=orders, wishes=wishes)

    status = _slow(OrderDesk.status)
    age = _slow(OrderDesk.age)
    cancel = _slow(OrderDesk.cancel)
    refund = _slow(OrderDesk.refund)
    transfer = _slow(OrderDesk.transfer)
