"""The order desk: its policy, its customer, its reward, its splits and its scripted clerks."""

from __future__ import annotations

import json
import random
from dataclasses import fields

import pytest

from oldlogits.core.errors import ConfigError
from oldlogits.core.parser import Malformed
from oldlogits.envs.base import load_environment
from oldlogits.envs.parsers.plain import PlainParser
from oldlogits.envs.tools import bind, tool_names
from order_desk.clerk import Clerk, ErrorRates, demonstrator, oracle
from order_desk.data import DAYS, FOOD, ITEMS, ORDER_IDS, WORDS, DeskRow, case_of, is_held_out, ruling
from order_desk.environment import LongOrderDesk, OrderDesk, judge

ROWS = [OrderDesk.make_row(split, index) for split in ("train", "heldout") for index in range(300)]


def serve(row: DeskRow, clerk: Clerk) -> tuple[OrderDesk, list[str]]:
    """An episode; the desk afterwards, and everything that was written and read."""
    desk = OrderDesk()
    seen: str | None = desk.reset(**row)
    next(clerk)
    lines = []
    while seen is not None:
        text = clerk.send(seen)
        lines += [seen, text]
        calls = PlainParser().parse(text)
        if not calls:
            seen = desk.reply(text)
        else:
            ready = bind(desk, *calls)
            assert not isinstance(ready, Malformed)
            seen = str(ready())
    return desk, lines


def scripted(row: DeskRow, *turns: str) -> OrderDesk:
    """The desk after these calls (``tool order``) and messages (``> text``)."""
    desk = OrderDesk()
    desk.reset(**row)
    for turn in turns:
        if turn.startswith("> "):
            desk.reply(turn[2:])
        else:
            tool, order = turn.split()
            {"cancel": desk.cancel, "refund": desk.refund, "transfer": desk.transfer}[tool](order)
    return desk


def one_wish(kind: str, status: str, *, days: int = 0, item: str = "lamp", withheld: bool = False) -> DeskRow:
    return {
        "customer": "anna",
        "orders": {
            "o10": {"customer": "anna", "item": item, "status": status, "days": days},
            "o11": {"customer": "ben", "item": "book", "status": "pending", "days": 0},
        },
        "wishes": [{"kind": kind, "order": "o10", "withheld": withheld}],
    }


POLICY = """
cancel pending   0  lamp  cancel   cancelled
cancel pending   0  milk  cancel   cancelled
cancel shipped   0  lamp  transfer transferred
cancel delivered 2  lamp  -        delivered
cancel delivered 85 milk  -        delivered
refund pending   0  lamp  -        pending
refund shipped   0  milk  transfer transferred
refund delivered 30 lamp  refund   refunded
refund delivered 31 lamp  -        expired
refund delivered 2  milk  -        food
refund delivered 85 milk  -        food
track  pending   0  lamp  -        pending
track  shipped   0  milk  -        shipped
track  delivered 85 lamp  -        delivered
track  delivered 2  milk  -        delivered
"""


@pytest.mark.parametrize("line", POLICY.strip().splitlines())
def test_the_policy_is_the_table_written_by_hand_and_only_its_row_is_rewarded(line):
    kind, status, days, item, action, told = line.split()
    row = one_wish(kind, status, days=int(days), item=item)
    ruled = ruling(kind, case_of(row["orders"]["o10"]))
    assert (ruled.action or "-", ruled.told) == (action, told)
    for tried in ("-", "cancel", "refund", "transfer"):
        for said in ("cancelled", "refunded", "transferred", "pending", "shipped", "delivered", "expired", "food"):
            calls = [] if tried == "-" else [f"{tried} o10"]
            reward = scripted(row, *calls, f"> it is {said}").get_reward()
            assert reward == float(tried == action and said == told)


def test_the_oracle_is_always_right_within_ten_turns():
    for row in ROWS:
        desk, lines = serve(row, oracle())
        assert desk.get_reward() == 1.0
        assert judge(desk).complaint == ""
        assert len(lines) // 2 <= 10


def test_every_tool_says_one_thing_and_changes_only_what_its_docstring_says():
    desk = OrderDesk()
    desk.reset(**one_wish("cancel", "delivered", days=12))
    assert [desk.status("o10"), desk.age("o10"), desk.age("o11"), desk.status("o99"), desk.age("o99")] == [
        "delivered",
        "12 days",
        "not delivered",
        "no such order",
        "no such order",
    ]
    assert [desk.cancel("o99"), desk.cancel("o11")] == ["no such order", "ok"]
    assert [desk.status("o10"), desk.status("o11")] == ["delivered", "cancelled"]


def test_an_action_on_another_order_is_not_rewarded():
    row = one_wish("cancel", "pending")
    assert scripted(row, "cancel o10", "cancel o11", "> it is cancelled").get_reward() == 0.0
    assert scripted(row, "cancel o11", "> it is cancelled").get_reward() == 0.0


def test_nothing_is_rewarded_before_the_customer_was_told():
    assert scripted(one_wish("cancel", "pending"), "cancel o10").get_reward() == 0.0


def test_a_withheld_number_is_told_once_and_a_needless_question_ends_the_episode():
    desk = OrderDesk()
    assert desk.reset(**one_wish("track", "pending", withheld=True)) == "anna here : please track my lamp order"
    assert desk.reply("which order ?") == "it is o10"
    assert desk.reply("which order ?") is None
    assert desk.reset(**one_wish("track", "pending")) == "anna here : please track my lamp order o10"
    assert desk.reply("which order ?") is None
    assert "number" in judge(desk).complaint
    assert desk.get_reward() == 0.0


@pytest.mark.parametrize("message", ["", "hello", "it is pending or shipped"])
def test_a_message_without_exactly_one_outcome_ends_the_episode_unrewarded(message):
    desk = OrderDesk()
    desk.reset(**one_wish("track", "pending"))
    assert desk.reply(message) is None
    assert "one outcome" in judge(desk).complaint
    assert desk.get_reward() == 0.0


def test_the_second_wish_comes_after_the_first_outcome_and_outcomes_count_in_order():
    row = one_wish("track", "pending")
    row["wishes"].append({"kind": "cancel", "order": "o11", "withheld": False})
    desk = OrderDesk()
    desk.reset(**row)
    assert desk.reply("it is pending") == "thanks , now please cancel my book order o11"
    desk.cancel("o11")
    assert desk.reply("it is cancelled") is None
    assert desk.get_reward() == 1.0
    assert scripted(row, "cancel o11", "> it is cancelled", "> it is pending").get_reward() == 0.0


def test_a_desk_can_be_reset_after_an_episode_without_a_trace_of_it():
    desk, _ = serve(one_wish("cancel", "pending"), oracle())
    desk.reset(**one_wish("cancel", "pending"))
    assert desk.get_reward() == 0.0
    assert desk.status("o10") == "pending"


def _arises(decision: str, row: DeskRow) -> bool:
    """Whether a single wish brings the clerk to this decision, and erring in it is wrong."""
    (wish,) = row["wishes"]
    kind, case = wish["kind"], case_of(row["orders"][wish["order"]])
    changes = kind != "track"
    return {
        "skip_question": wish["withheld"],
        "grant_shipped": changes and case == "shipped",
        "grant_refused": (kind == "cancel" and case not in ("pending", "shipped")) or (kind, case) == ("refund", "pending"),
        "skip_age": (kind, case) == ("refund", "expired"),
        "refund_expired": (kind, case) == ("refund", "expired"),
        "refund_food": (kind, case) == ("refund", "food"),
        "refuse_allowed": (kind == "cancel" and case == "pending")
        or (kind == "refund" and case in ("fresh", "expired", "food")),
        "only_say": ruling(kind, case).action is not None,
        "misreport": True,
    }[decision]


@pytest.mark.parametrize("decision", sorted({field.name for field in fields(ErrorRates)} - {"skip_status"}))
def test_an_error_loses_the_reward_exactly_where_its_decision_arises(decision):
    rows = [row for row in ROWS if len(row["wishes"]) == 1 and case_of(row["orders"][row["wishes"][0]["order"]]) != "food"]
    rows += [one_wish("refund", "delivered", days=2, item="milk")] if decision == "refund_food" else []
    arising = 0
    for row in rows:
        desk, _ = serve(row, demonstrator(ErrorRates(**{decision: 1.0}), random.Random(0)))
        assert desk.get_reward() == float(not _arises(decision, row)), row
        arising += _arises(decision, row)
    assert arising > 0


def test_guessing_the_status_is_right_only_where_the_customer_hopes_right():
    for status, kind, reward in [("pending", "cancel", 1.0), ("shipped", "cancel", 0.0), ("shipped", "track", 1.0)]:
        desk, lines = serve(one_wish(kind, status), demonstrator(ErrorRates(skip_status=1.0), random.Random(0)))
        assert desk.get_reward() == reward
        assert "<call> status o10 </call>" not in lines


def test_demonstrators_err_in_decisions_but_never_copy_a_wrong_number():
    rng = random.Random(1)
    rates = ErrorRates(**{field.name: 0.5 for field in fields(ErrorRates)})
    rewards = []
    for row in ROWS:
        desk, lines = serve(row, demonstrator(rates, rng))
        rewards.append(desk.get_reward())
        wished = iter([wish["order"] for wish in row["wishes"]])
        current = ""
        for read, written in zip(lines[::2], lines[1::2], strict=True):
            current = next(wished) if "please" in read else current
            if written.startswith("<call>"):
                assert written.split()[2] == current
    assert 0 < sum(rewards) < len(rewards) / 2


def test_error_rates_are_probabilities():
    with pytest.raises(ConfigError, match="only_say"):
        ErrorRates(only_say=1.5)


@pytest.mark.parametrize("desk", [OrderDesk, LongOrderDesk])
def test_rows_are_json_and_repeat_exactly(desk):
    for split in ("train", "heldout"):
        for index in (-5, 0, 17, 10**9):
            row = desk.make_row(split, index)
            assert json.loads(json.dumps(row)) == row == desk.make_row(split, index)
    assert desk.make_row("train", 0) != desk.make_row("heldout", 0) != desk.make_row("heldout", 1)


@pytest.mark.parametrize("desk", [OrderDesk, LongOrderDesk])
def test_held_out_rows_show_only_pairs_that_training_never_shows(desk):
    for split, held_out in (("train", False), ("heldout", True)):
        for index in range(300):
            for number, order in desk.make_row(split, index)["orders"].items():
                assert is_held_out(number, order["item"]) is held_out
    share = sum(is_held_out(number, item) for number in ORDER_IDS for item in ITEMS) / (len(ORDER_IDS) * len(ITEMS))
    assert share == 0.25


@pytest.mark.slow
@pytest.mark.parametrize("desk", [OrderDesk, LongOrderDesk])
def test_every_held_out_word_is_trained_and_in_the_vocabulary(desk):
    def words(split: str, num: int) -> set[str]:
        found = set()
        for index in range(num):
            _, lines = serve(desk.make_row(split, index), oracle())
            found |= {word for line in lines for word in line.split()}
        return found

    trained = words("train", 1500)
    assert words("heldout", 500) <= trained
    assert trained <= {*WORDS, *tool_names(OrderDesk), "<call>", "</call>"}
    assert {*ORDER_IDS, *ITEMS, *FOOD} <= trained
    assert len(trained & {str(days) for days in DAYS}) == len(DAYS)
    assert set(OrderDesk.system_prompt.split()) <= set(WORDS)


def test_the_held_out_split_composes_more():
    def share(split: str, num_wishes: int) -> float:
        rows = [OrderDesk.make_row(split, index) for index in range(1000)]
        return sum(len(row["wishes"]) == num_wishes for row in rows) / len(rows)

    assert share("train", 2) == pytest.approx(0.3, abs=0.05)
    assert share("heldout", 2) == pytest.approx(0.55, abs=0.05)


def test_a_long_row_has_four_to_six_wishes_each_of_an_order_of_its_own():
    rows = [LongOrderDesk.make_row(split, index) for split in ("train", "heldout") for index in range(300)]
    assert {len(row["wishes"]) for row in rows} == {4, 5, 6}
    for row in rows:
        wished = {wish["order"] for wish in row["wishes"]}
        assert len(wished) == len(row["wishes"]) == len(row["orders"]) - 1
        assert wished < row["orders"].keys()
    withheld = [wish["withheld"] for row in rows for wish in row["wishes"]]
    assert sum(withheld) / len(withheld) == pytest.approx(0.2, abs=0.03)


def test_the_oracle_serves_long_rows_right_in_about_fourteen_turns_and_one_mistake_loses_the_reward():
    turns = []
    for index in range(100):
        row = LongOrderDesk.make_row("heldout", index)
        desk, lines = serve(row, oracle())
        assert desk.get_reward() == 1.0
        turns.append(len(lines) // 2)
        mistake = index % len(row["wishes"])
        desk = LongOrderDesk()
        desk.reset(**row)
        for told, wish in enumerate(row["wishes"]):
            ruled = ruling(wish["kind"], case_of(row["orders"][wish["order"]]))
            if ruled.action and told != mistake:
                {"cancel": desk.cancel, "refund": desk.refund, "transfer": desk.transfer}[ruled.action](wish["order"])
            wrong = "pending" if ruled.told != "pending" else "shipped"
            desk.reply(f"it is {wrong if told == mistake else ruled.told}")
        assert desk.get_reward() == 0.0
    assert sum(turns) / len(turns) == pytest.approx(14, abs=1)
    assert max(turns) <= 30


def test_the_desk_has_the_shape_of_an_environment():
    assert load_environment("desk") is OrderDesk
    assert load_environment("desk_long") is LongOrderDesk
    assert tool_names(LongOrderDesk) == tool_names(OrderDesk)
    assert tool_names(OrderDesk) == ("status", "age", "cancel", "refund", "transfer")
