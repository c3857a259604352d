"""The order desk: an agent with five tools serves a scripted customer under a written policy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final, Literal

from oldlogits.core.environment import ModelOrder
from order_desk.clerk import LONG_MIXTURE, MIXTURE, ErrorRates, oracle
from order_desk.data import (
    NOT_DELIVERED,
    OUTCOME,
    DeskRow,
    OrderRow,
    Status,
    WishRow,
    case_of,
    make_desk_row,
    make_long_row,
    ruling,
)

OUTCOME_WORDS: Final = frozenset({"cancelled", "refunded", "transferred", "pending", "shipped", "delivered", "expired", "food"})


class OrderDesk:
    """The order desk: serve one customer by the policy.

    cancel: a pending order is cancelled; a delivered one is refused.
    refund: a delivered order is refunded within 30 days, food never;
        a pending one is refused.
    track: tell the status.
    A shipped order that is to be cancelled or refunded is transferred
    to a person. Ask "which order ?" if no number was given, and only
    then. End each wish with one message that holds one word: cancelled,
    refunded or transferred; for a refusal its reason: pending,
    delivered, expired or food; for tracking the status.

    The reward is 1 if every order is as the policy would leave it and
    the customer was told exactly these words, in order; else 0.
    """

    system_prompt: ClassVar[str] = (
        "order desk . cancel if pending . transfer if shipped . "
        "refund if delivered within 30 days , never food . else say why ."
    )
    demonstrators: ClassVar[ErrorRates] = MIXTURE
    max_demonstrations_per_step: ClassVar[int] = 16

    def __init__(self) -> None:
        """Open an empty desk."""
        self._orders: dict[str, OrderRow] = {}
        self._wishes: list[WishRow] = []
        self._status: dict[str, Status] = {}
        self._told: list[str] = []
        self._asked = False
        self._complaint = ""

    @staticmethod
    def make_row(split: Literal["train", "heldout"], index: int) -> DeskRow:
        """Return row `index` of a split."""
        return make_desk_row(split, index)

    @staticmethod
    def make_oracle() -> Callable[[str], str]:
        """Return an agent that makes no mistake: it is sent what the agent reads, and returns what the agent writes."""
        clerk = oracle()
        next(clerk)
        return clerk.send

    @staticmethod
    def warm_start(order: ModelOrder) -> Path:
        """Train the model of `order.folder` on demonstrations; return the folder of the result."""
        from order_desk.warm_start import warm_start_folder

        return warm_start_folder(order)

    def reset(self, *, customer: str, orders: dict[str, OrderRow], wishes: list[WishRow]) -> str:
        """A customer comes in; what they say first."""
        self._orders, self._wishes = orders, wishes
        self._status = {number: order["status"] for number, order in orders.items()}
        self._told = []
        self._asked = False
        self._complaint = ""
        return f"{customer} here : {self._wish_text()}"

    def status(self, order: str) -> str:
        """The status of an order: pending, shipped or delivered."""
        return self._status.get(order, "no such order")

    def age(self, order: str) -> str:
        """How many days ago an order was delivered."""
        if order not in self._orders:
            return "no such order"
        days = self._orders[order]["days"]
        return f"{days} days" if days else NOT_DELIVERED

    def cancel(self, order: str) -> str:
        """Cancel an order."""
        return self._change(order, OUTCOME["cancel"])

    def refund(self, order: str) -> str:
        """Take an order back and refund it."""
        return self._change(order, OUTCOME["refund"])

    def transfer(self, order: str) -> str:
        """Hand an order over to a person."""
        return self._change(order, OUTCOME["transfer"])

    def _change(self, order: str, status: Status) -> str:
        if order not in self._orders:
            return "no such order"
        self._status[order] = status
        return "ok"

    def reply(self, message: str) -> str | None:
        """The customer's answer to a message; None when they leave."""
        words = set(message.split())
        wish = self._wishes[len(self._told)]
        if words >= {"which", "order"}:
            if not wish["withheld"] or self._asked:
                self._complaint = "they were asked for an order number that they had given"
                return None
            self._asked = True
            return f"it is {wish['order']}"
        outcomes = sorted(words & OUTCOME_WORDS)
        if len(outcomes) != 1:
            self._complaint = "a message did not tell exactly one outcome"
            return None
        self._told.append(outcomes[0])
        self._asked = False
        if len(self._told) == len(self._wishes):
            return None
        return f"thanks , now {self._wish_text()}"

    def get_reward(self) -> float:
        """Return 1.0 if the orders and what was told are exactly right, else 0.0."""
        return float(judge(self).right)

    def explain_reward(self) -> str:
        """Return a line for everything that is not as the policy wants it."""
        return "\n".join(reasons(judge(self)))

    def _wish_text(self) -> str:
        wish = self._wishes[len(self._told)]
        text = f"please {wish['kind']} my {self._orders[wish['order']]['item']} order"
        return text if wish["withheld"] else f"{text} {wish['order']}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the policy asks for, against what happened.

    Args:
        orders: (order, status by the policy, status now) of every order.
        expected_told: The words that the customer should have been told.
        told: The words that they were told.
        complaint: Why the customer left early; empty if they did not.
    """

    orders: tuple[tuple[str, Status, Status], ...]
    expected_told: tuple[str, ...]
    told: tuple[str, ...]
    complaint: str

    @property
    def right(self) -> bool:
        """Whether everything is exactly right."""
        return (
            not self.complaint
            and self.told == self.expected_told
            and all(expected == actual for _, expected, actual in self.orders)
        )


def judge(desk: OrderDesk) -> Verdict:
    """Compare the desk as it is with what the policy asks for."""
    expected = {number: order["status"] for number, order in desk._orders.items()}
    expected_told = []
    for wish in desk._wishes:
        ruled = ruling(wish["kind"], case_of(desk._orders[wish["order"]]))
        expected_told.append(ruled.told)
        if ruled.action is not None:
            expected[wish["order"]] = OUTCOME[ruled.action]
    return Verdict(
        orders=tuple((number, status, desk._status[number]) for number, status in expected.items()),
        expected_told=tuple(expected_told),
        told=tuple(desk._told),
        complaint=desk._complaint,
    )


def reasons(verdict: Verdict) -> list[str]:
    """Say why an episode was not right; empty if it was."""
    found = [f"{order} should be {wanted}, but is {actual}" for order, wanted, actual in verdict.orders if wanted != actual]
    if verdict.complaint:
        found.append(f"the customer left: {verdict.complaint}")
    elif verdict.told != verdict.expected_told:
        told = ", ".join(verdict.told) or "nothing"
        found.append(f"the customer should have been told {', '.join(verdict.expected_told)}, but was told {told}")
    return found


class LongOrderDesk(OrderDesk):  # noqa: D101
    # A long horizon: customers have four to six wishes, and one mistake loses the reward. Players read the docstring, which
    # is the policy: it is inherited.

    demonstrators = LONG_MIXTURE
    max_demonstrations_per_step = 8

    @staticmethod
    def make_row(split: Literal["train", "heldout"], index: int) -> DeskRow:
        """Return row `index` of a split."""
        return make_long_row(split, index)
