"""Scripted clerks: the oracle, and demonstrators that decide wrongly at given rates but never copy wrongly."""

from __future__ import annotations

import random
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass
from typing import Final

from oldlogits.core.errors import ConfigError
from order_desk.data import FOOD, NOT_DELIVERED, OUTCOME, WINDOW_DAYS, Action

Clerk = Generator[str, str, None]
"""Is sent what the desk's agent reads, yields what the agent writes; prime it with ``next``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorRates:
    """How often a demonstrator decides wrongly, where the decision arises. All 0: the oracle.

    Args:
        skip_question: Claims to have transferred an order without asking for its number.
        skip_status: Guesses that the status allows the wish instead of looking it up.
        grant_shipped: Does what is wished to a shipped order instead of handing it over.
        grant_refused: Cancels what must be refused because it was delivered; refunds what is still pending.
        skip_age: Refunds a delivered order without looking at its age.
        refund_expired: Refunds after the window.
        refund_food: Refunds food.
        refuse_allowed: Refuses what the status allows.
        only_say: Tells the outcome without acting.
        misreport: Tells the status instead of the outcome; "transferred" where the status is the outcome.
    """

    skip_question: float = 0.0
    skip_status: float = 0.0
    grant_shipped: float = 0.0
    grant_refused: float = 0.0
    skip_age: float = 0.0
    refund_expired: float = 0.0
    refund_food: float = 0.0
    refuse_allowed: float = 0.0
    only_say: float = 0.0
    misreport: float = 0.0

    def __post_init__(self) -> None:
        """Refuse rates that are no probabilities."""
        wrong = {name: rate for name, rate in asdict(self).items() if not 0 <= rate <= 1}
        if wrong:
            raise ConfigError("an error rate is no probability", got=str(wrong), allowed="0 to 1", fix="correct the rate")


MIXTURE: Final = ErrorRates(
    skip_question=0.6,
    skip_status=0.08,
    grant_shipped=0.72,
    grant_refused=0.3,
    skip_age=0.1,
    refund_expired=0.52,
    refund_food=0.3,
    refuse_allowed=0.08,
    only_say=0.05,
    misreport=0.04,
)
"""Demonstrators whose likeliest decision is wrong in some places: greedy decoding fails there, sampling does not always."""

LONG_MIXTURE: Final = ErrorRates(**{decision: 0.7 * rate for decision, rate in asdict(MIXTURE).items()})
"""Demonstrators of long episodes err less often, since one mistake of five wishes loses the reward."""

Errs = Callable[[str], bool]
"""Whether the clerk errs now, in a decision of this name (a field of `ErrorRates`)."""


def oracle() -> Clerk:
    """A clerk who never errs."""
    return clerk(lambda _: False)


def demonstrator(rates: ErrorRates, rng: random.Random) -> Clerk:
    """A clerk who errs at these rates, independently in every decision."""
    table: dict[str, float] = asdict(rates)
    return clerk(lambda decision: rng.random() < table[decision])


def clerk(errs: Errs) -> Clerk:
    """Serves wish after wish; ``errs`` is asked at every decision."""
    message = yield ""
    while True:
        message = yield from _serve(message, errs)


def _call(tool: str, order: str) -> str:
    return f"<call> {tool} {order} </call>"


def _tell(outcome: str) -> str:
    return f"it is {outcome}"


def _serve(wish: str, errs: Errs) -> Generator[str, str, str]:
    """From a wish to the customer's next message."""
    words = wish.split()
    kind, item, order = words[words.index("please") + 1], words[words.index("my") + 1], words[-1]
    if order == "order":
        if errs("skip_question"):
            return (yield _tell("transferred"))
        order = (yield "which order ?").split()[-1]
    status = _HOPED[kind] if errs("skip_status") else (yield _call("status", order))
    action, told = (None, status) if kind == "track" else (yield from _decide(kind, item, order, status, errs))
    if action is not None and not errs("only_say"):
        yield _call(action, order)
    if errs("misreport"):
        told = status if told != status else "transferred"
    return (yield _tell(told))


_HOPED: Final = {"cancel": "pending", "refund": "delivered", "track": "shipped"}
"""The status that a clerk who does not look hopes for."""


def _decide(kind: str, item: str, order: str, status: str, errs: Errs) -> Generator[str, str, tuple[Action | None, str]]:
    """What to do, and what to tell."""
    action: Action | None = "cancel" if kind == "cancel" else "refund"
    reason = status
    if status == "shipped":
        action = action if errs("grant_shipped") else "transfer"
    elif status != _HOPED[kind]:
        action = action if errs("grant_refused") else None
    elif errs("refuse_allowed"):
        action = None
    elif kind == "refund":
        reason = yield from _why_not_refund(item, order, errs)
        action = None if reason else "refund"
    return action, reason if action is None else OUTCOME[action]


def _why_not_refund(item: str, order: str, errs: Errs) -> Generator[str, str, str]:
    """Why a delivered order may not be refunded: "food", "expired", or "" if it may."""
    if item in FOOD and not errs("refund_food"):
        return "food"
    if errs("skip_age"):
        return ""
    age = yield _call("age", order)
    if age == NOT_DELIVERED:
        return "pending"
    return "expired" if int(age.split()[0]) > WINDOW_DAYS and not errs("refund_expired") else ""
