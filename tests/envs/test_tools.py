"""The tools of an environment: their schemas, and the binding of calls."""

from __future__ import annotations

import asyncio
import inspect
import json
import threading
import typing
from dataclasses import dataclass
from datetime import date
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Literal

import pytest
from pydantic import BaseModel, Field
from typing_extensions import TypedDict

from oldlogits.core.errors import EnvironmentShapeError
from oldlogits.core.parser import Malformed, ToolCall
from oldlogits.envs.base import check_environment
from oldlogits.envs.tools import bind, render_result, tool_names, tool_schemas, with_names


class Base:
    def inherited(self) -> str:
        """From the base."""
        return "base"


class Shop(Base):
    system_prompt = "a shop"

    def __init__(self) -> None:
        self.public_value = 3

    @staticmethod
    def make_row(split: str, index: int) -> dict[str, int]:
        return {"index": index}

    def reset(self, index: int = 0) -> str:
        return f"hello {index}"

    def get_reward(self) -> float:
        return 1.0

    def reply(self, message: str) -> str | None:
        return None

    def zip_code(self, city: str, digits: int = 5, size: Literal["s", "m"] = "s", tags: list[str] | None = None) -> str:
        """Look up.

        Args:
            city: Where.
        """
        return f"{city} {digits!r} {size} {tags}"

    async def add(self, a: int, b: float) -> float:
        """Add."""
        return a + b

    def flag(self, on: bool) -> str:
        """Set."""
        return repr(on)

    def _private(self) -> str:
        return "hidden"


def test_tools_are_the_public_documented_methods_in_the_order_they_are_written():
    assert tool_names(Shop) == ("inherited", "zip_code", "add", "flag")
    assert check_environment(Shop) is Shop


def test_a_schema_says_the_type_of_every_parameter_and_which_are_required():
    assert tool_schemas(Shop)[1] == {
        "type": "function",
        "function": {
            "name": "zip_code",
            "description": "Look up.\n\nArgs:\n    city: Where.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "digits": {"type": "integer"},
                    "size": {"type": "string", "enum": ["s", "m"]},
                    "tags": {"anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "null"}]},
                },
                "required": ["city"],
            },
        },
    }
    assert json.loads(json.dumps(tool_schemas(Shop))) == tool_schemas(Shop)


def _run(call: ToolCall) -> object:
    ready = bind(Shop(), call)
    assert not isinstance(ready, Malformed), ready
    result = ready()
    return asyncio.run(_wait(result)) if inspect.isawaitable(result) else result


async def _wait(result):
    return await result


def test_a_bound_call_runs_with_words_converted_to_the_annotated_types():
    assert _run(ToolCall(name="zip_code", positional=("bonn", "7", "m"))) == "bonn 7 m None"
    assert _run(ToolCall(name="zip_code", positional=("12",))) == "12 5 s None"
    assert _run(ToolCall(name="zip_code", named={"city": "bonn", "tags": ["a"]})) == "bonn 5 s ['a']"
    assert _run(ToolCall(name="add", positional=("2", "0.5"))) == 2.5
    assert _run(ToolCall(name="flag", positional=("true",))) == "True"


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (ToolCall(name="fly"), "error : no tool fly ; tools are inherited zip_code add flag"),
        (ToolCall(name="reset"), "error : no tool reset"),
        (ToolCall(name="_private"), "error : no tool _private"),
        (ToolCall(name="inherited", positional=("x",)), "error : inherited takes nothing but got x"),
        (ToolCall(name="add", positional=("1",)), "error : add takes a b but got 1"),
        (ToolCall(name="add", named={"a": 1, "c": 2}), "error : add takes a b but got a c"),
        (ToolCall(name="add", positional=("one", "2")), 'error : add wants a as int but got "one"'),
        (ToolCall(name="add", named={"a": True, "b": 1.0}), "error : add wants a as int but got true"),
        (ToolCall(name="flag", named={"on": 1}), "error : flag wants on as bool but got 1"),
        (ToolCall(name="zip_code", named={"city": 3}), "error : zip_code wants city as str but got 3"),
        (ToolCall(name="zip_code", positional=("a", "1", "xl")), "error : zip_code wants size as Literal['s', 'm']"),
        (ToolCall(name="zip_code", named={"city": "a", "tags": [1]}), "error : zip_code wants tags as"),
    ],
)
def test_a_call_that_does_not_fit_is_answered_and_never_raises(call, reason):
    ready = bind(Shop(), call)
    assert isinstance(ready, Malformed)
    assert ready.reason.startswith(reason)


def test_results_are_rendered_as_text_json_or_str():
    assert [render_result(value) for value in ("a b", {"a": [1, None]}, [True], 2.5, None)] == [
        "a b",
        '{"a": [1, null]}',
        "[true]",
        "2.5",
        "None",
    ]


class Address(TypedDict):
    city: str


@dataclass
class Point:
    x: int


class Parcel(BaseModel):
    grams: int = Field(gt=0)


class Post:
    def reset(self) -> None: ...

    def get_reward(self) -> float:
        return 0.0

    def send(self, to: Address, at: Point, what: Parcel, stamps: Annotated[int, Field(le=3)] = 1) -> str:
        """Send."""
        return f"{to['city']} {at.x} {what.grams} {stamps}"


def test_arguments_may_be_typed_dictionaries_dataclasses_and_pydantic_models_and_arrive_as_such():
    named = {"to": {"city": "bonn"}, "at": {"x": 1}, "what": {"grams": 5}}
    ready = bind(Post(), ToolCall(name="send", named=named))
    assert not isinstance(ready, Malformed)
    assert ready() == "bonn 1 5 1"
    properties = tool_schemas(Post)[0]["function"]["parameters"]["properties"]
    assert properties["to"]["properties"] == {"city": {"title": "City", "type": "string"}}
    assert properties["at"]["required"] == ["x"]
    assert properties["what"]["properties"]["grams"]["exclusiveMinimum"] == 0
    for wrong in ({"to": {}}, {"at": {"x": "1"}}, {"what": {"grams": 0}}, {"stamps": 4}):
        assert isinstance(bind(Post(), ToolCall(name="send", named={**named, **wrong})), Malformed), wrong


def test_a_parameter_that_json_cannot_fill_is_refused_at_the_start():
    class Odd(Post):
        def put(self, thing: threading.Lock) -> str:
            """Put."""
            return ""

    with pytest.raises(EnvironmentShapeError, match=r"Odd\.put has a parameter that JSON cannot fill; got: thing"):
        check_environment(Odd)


def test_arguments_by_position_are_given_their_names():
    assert with_names(Shop, ToolCall(name="add", positional=("1",), named={"b": 2})) == ToolCall(
        name="add", named={"a": "1", "b": 2}
    )


if TYPE_CHECKING:
    from decimal import Decimal


class Kinds:
    """Tools of every kind of method."""

    unit = "g"

    def reset(self) -> None: ...

    def get_reward(self) -> float:
        return 0.0

    @staticmethod
    def add(a: int, b: int = 1) -> int:
        """Add."""
        return a + b

    @classmethod
    def weigh(cls, grams: float) -> str:
        """Weigh."""
        return f"{grams} {cls.unit}"

    def count(self, words: typing.List) -> int:  # noqa: UP006
        """Count."""
        return len(words)

    def price(self, of: str) -> Decimal:
        """A return annotation is nobody's business."""
        return of

    @staticmethod
    def make_oracle():
        raise AssertionError("no tool")


def test_static_and_class_methods_are_tools_with_their_own_parameters():
    check_environment(Kinds)
    assert tool_names(Kinds) == ("add", "weigh", "count", "price")
    schemas = {s["function"]["name"]: s["function"]["parameters"] for s in tool_schemas(Kinds)}
    assert list(schemas["add"]["properties"]) == ["a", "b"]
    assert (schemas["add"]["required"], schemas["weigh"]["required"]) == (["a"], ["grams"])
    assert bind(Kinds(), ToolCall(name="add", named={"a": 2}))() == 3
    assert bind(Kinds(), ToolCall(name="weigh", named={"grams": 2.5}))() == "2.5 g"


def test_a_bare_list_takes_any_list():
    assert bind(Kinds(), ToolCall(name="count", named={"words": ["a", 1, None]}))() == 3
    assert isinstance(bind(Kinds(), ToolCall(name="count", named={"words": "ab"})), Malformed)


def test_a_parameter_whose_annotation_exists_only_for_type_checkers_is_refused_by_name():
    class Checked(Kinds):
        def pay(self, amount: Decimal) -> str:
            """Pay."""
            return str(amount)

    with pytest.raises(EnvironmentShapeError, match=r"Checked\.pay has an annotation.*amount.*NameError.*TYPE_CHECKING"):
        check_environment(Checked)


class Colour(Enum):
    RED = "red"


@dataclass
class Flight:
    number: str
    parcels: list[Parcel]
    day: date = date(2026, 1, 2)
    colour: Colour = Colour.RED
    via: Flight | None = None


class Tree(BaseModel):
    leaves: list[Parcel] = []
    branches: list[Tree] = []
    colour: Colour = Colour.RED


def test_results_that_are_models_dataclasses_or_lists_of_them_are_json():
    flight = Flight("BA 1", [Parcel(grams=2)])
    written = {"number": "BA 1", "parcels": [{"grams": 2}], "day": "2026-01-02", "colour": "red", "via": None}
    assert json.loads(render_result(flight)) == written
    assert json.loads(render_result([flight, (Parcel(grams=1), {"to": flight})])) == [written, [{"grams": 1}, {"to": written}]]
    assert json.loads(render_result(Tree(leaves=[Parcel(grams=3)]))) == {
        "leaves": [{"grams": 3}],
        "branches": [],
        "colour": "red",
    }
    assert render_result({"name": "für"}) == '{"name": "für"}'
    for value in ({"a": {1}}, [object()], [Flight]):
        with pytest.raises(TypeError):
            render_result(value)


def test_schemas_hold_no_references_and_what_refers_to_itself_is_an_object_there():
    class Garden(Post):
        def plant(self, tree: Tree, flights: list[Flight] | None = None) -> str:
            """Plant."""
            return f"{tree.branches[0].leaves[0].grams} {flights[0].parcels[0].grams}"

    schema = tool_schemas(check_environment(Garden))[1]["function"]["parameters"]
    assert "$ref" not in json.dumps(schema)
    tree = schema["properties"]["tree"]["properties"]
    assert tree["leaves"]["items"]["properties"]["grams"]["exclusiveMinimum"] == 0
    assert tree["branches"]["items"] == {"type": "object"}
    assert tree["colour"] == {"default": "red", "enum": ["red"], "title": "Colour", "type": "string"}
    tree = {"branches": [{"leaves": [{"grams": 7}]}]}
    call = ToolCall(name="plant", named={"tree": tree, "flights": [{"number": "a", "parcels": [{"grams": 9}]}]})
    assert bind(Garden(), call)() == "7 9"
