"""The order desk's world: orders, wishes, the written policy as one function, and rows that are made from a seed."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias, TypedDict

Status = Literal["pending", "shipped", "delivered", "cancelled", "refunded", "transferred"]
Kind = Literal["cancel", "refund", "track"]
Action = Literal["cancel", "refund", "transfer"]

WINDOW_DAYS: Final = 30
NAMES: Final = ("anna", "ben", "carla", "david", "emma", "felix")
FOOD: Final = ("bread", "cheese", "honey", "milk")
GOODS: Final = ("lamp", "book", "chair", "phone", "clock", "coat", "drum", "tent")
ITEMS: Final = (*GOODS, *FOOD)
ORDER_IDS: Final = tuple(f"o{number}" for number in range(10, 50))
FRESH_DAYS: Final = (3, 7, 12, 18, 24, 30)
OLD_DAYS: Final = (31, 38, 45, 52, 60, 85)
DAYS: Final = (*FRESH_DAYS, *OLD_DAYS)
NOT_DELIVERED: Final = "not delivered"
_SAID: Final = """
    order desk . cancel if pending transfer shipped refund delivered within 30 days , never food else say why
    here : please track my thanks now it is which ? cancelled refunded transferred expired status age not ok no such
    error ; tool tools are takes but got nothing the call names write one as argument
"""
WORDS: Final = (
    *_SAID.split(),
    *NAMES,
    *ITEMS,
    *ORDER_IDS,
    *(str(days) for days in DAYS),
)
"""Every word that is said at the desk: the vocabulary of a word-level tokenizer."""


class OrderRow(TypedDict):
    """An order as a row file holds it; `days` since delivery, 0 before."""

    customer: str
    item: str
    status: Status
    days: int


class WishRow(TypedDict):
    """What the customer wants of one order; `withheld`: the number is told only when asked for."""

    kind: Kind
    order: str
    withheld: bool


class DeskRow(TypedDict):
    """One episode."""

    customer: str
    orders: dict[str, OrderRow]
    wishes: list[WishRow]


@dataclass(frozen=True, slots=True)
class Ruling:
    """What the policy says: the tool that changes the order, if any, and the word that the customer must be told."""

    action: Action | None
    told: str


OUTCOME: Final[dict[Action, Status]] = {"cancel": "cancelled", "refund": "refunded", "transfer": "transferred"}
"""The status in which an action leaves an order."""

Case: TypeAlias = Literal["pending", "shipped", "fresh", "expired", "food"]
"""What the policy distinguishes; the last three are delivered orders."""


def ruling(kind: Kind, case: Case) -> Ruling:
    """The desk's policy: what to do, and the word to tell: the outcome, or why the wish is refused.

    | wish | pending | shipped | delivered, <= 30 days | delivered, > 30 days | delivered food |
    | --- | --- | --- | --- | --- | --- |
    | cancel | cancel | transfer | refuse: delivered | refuse: delivered | refuse: delivered |
    | refund | refuse: pending | transfer | refund | refuse: expired | refuse: food |
    | track | tell pending | tell shipped | tell delivered | tell delivered | tell delivered |
    """
    if kind != "track" and case == "shipped":
        return Ruling("transfer", "transferred")
    if (kind, case) == ("cancel", "pending"):
        return Ruling("cancel", "cancelled")
    if (kind, case) == ("refund", "fresh"):
        return Ruling("refund", "refunded")
    if kind == "refund" or case in ("pending", "shipped"):
        return Ruling(None, case)
    return Ruling(None, "delivered")


def case_of(order: OrderRow) -> Case:
    """Which column of the policy an untouched order falls under."""
    if order["status"] == "pending" or order["status"] == "shipped":
        return order["status"]
    if order["item"] in FOOD:
        return "food"
    return "fresh" if order["days"] <= WINDOW_DAYS else "expired"


_CELLS: Final[tuple[tuple[Kind, Case], ...]] = (
    ("cancel", "pending"),
    ("cancel", "pending"),
    ("cancel", "shipped"),
    ("cancel", "fresh"),
    ("cancel", "expired"),
    ("refund", "pending"),
    ("refund", "shipped"),
    ("refund", "fresh"),
    ("refund", "fresh"),
    ("refund", "expired"),
    ("refund", "expired"),
    ("refund", "food"),
    ("refund", "food"),
    ("track", "pending"),
    ("track", "shipped"),
    ("track", "fresh"),
)
"""What wishes are drawn from, uniformly."""


def is_held_out(order: str, item: str) -> bool:
    """Whether the pair of an order number and an item is kept for the held-out split (one of four)."""
    return (ORDER_IDS.index(order) + ITEMS.index(item)) % 4 == 0


def make_desk_row(split: Literal["train", "heldout"], index: int) -> DeskRow:
    """Row `index` of a split: the same arguments give the same row on every machine.

    A customer has one wish, or two (train 30%, held-out 55%), and withholds the number of an order in 30% of the wishes (20%
    where training has two). Training never shows the pairs of number and item of the held-out split, but all their words.
    """
    rng = random.Random(f"{split} {index}")
    held_out = split == "heldout"
    num_wishes = 1 + (rng.random() < (0.55 if held_out else 0.3))
    withheld_share = 0.2 if num_wishes == 2 and not held_out else 0.3
    return _make_row(rng, held_out, num_wishes, num_orders=3, withheld_share=withheld_share)


def make_long_row(split: Literal["train", "heldout"], index: int) -> DeskRow:
    """Row `index` of a split with four to six wishes, one in five without the order's number.

    Training never shows the pairs of number and item of the held-out split, but all their words.
    """
    rng = random.Random(f"long {split} {index}")
    num_wishes = rng.randint(4, 6)
    return _make_row(rng, split == "heldout", num_wishes, num_orders=num_wishes + 1, withheld_share=0.2)


def _make_row(rng: random.Random, held_out: bool, num_wishes: int, *, num_orders: int, withheld_share: float) -> DeskRow:
    wishes: list[WishRow] = []
    orders: dict[str, OrderRow] = {}
    customer = rng.choice(NAMES)
    for order_id in rng.sample(ORDER_IDS, num_orders):
        kind, case = rng.choice(_CELLS)
        wished = len(wishes) < num_wishes
        orders[order_id] = _make_order(rng, order_id, kind, case, held_out, customer if wished else rng.choice(NAMES))
        if wished:
            wishes.append({"kind": kind, "order": order_id, "withheld": rng.random() < withheld_share})
    return {"customer": customer, "orders": orders, "wishes": wishes}


def _make_order(rng: random.Random, order_id: str, kind: Kind, case: Case, held_out: bool, customer: str) -> OrderRow:
    shelf = FOOD if case == "food" else GOODS if kind == "refund" and case in ("fresh", "expired") else ITEMS
    item = rng.choice([item for item in shelf if is_held_out(order_id, item) == held_out])
    status: Status = case if case == "pending" or case == "shipped" else "delivered"
    days = 0 if status != "delivered" else rng.choice({"fresh": FRESH_DAYS, "expired": OLD_DAYS, "food": DAYS}[case])
    return {"customer": customer, "item": item, "status": status, "days": days}
