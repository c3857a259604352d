"""Layouts do not depend on order, buffers do not overlap, shards make the whole, and misfits are refused by name."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oldlogits.core.errors import ExactnessError, LayoutError
from oldlogits.versions import Entry, FlatWeights, Layout, Shard, encode
from oldlogits.versions.patches.layout import ALIGNMENT
from tests.versions.states import assert_bits, state

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.int32, torch.bool, torch.float8_e5m2)
shapes = st.lists(st.integers(0, 5), max_size=3)
models = st.dictionaries(st.text("abc.", min_size=1, max_size=4), st.tuples(st.sampled_from(DTYPES), shapes), max_size=6)


def tensors_of(model):
    return {name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in model.items()}


def entry(name="w", start=0, stop=6, shape=(2, 3), dtype=torch.float32):
    return Entry(name=name, dtype=dtype, shape=shape, start=start, stop=stop)


def layout(*entries, **more):
    return Layout(entries=entries, **more)


@pytest.mark.slow
@given(models, st.randoms())
def test_a_layout_does_not_depend_on_the_order_of_names(model, random):
    tensors = tensors_of(model)
    shuffled = random.sample(sorted(tensors), len(tensors))
    assert Layout.of({name: tensors[name] for name in shuffled}) == Layout.of(tensors)


@pytest.mark.slow
@given(models)
def test_entries_lie_apart_aligned_and_within_their_buffers(model):
    found = Layout.of(tensors_of(model))
    for dtype in found.dtypes:
        end = 0
        for e in (e for e in found.entries if e.dtype == dtype):
            assert e.offset >= end
            assert e.offset * dtype.itemsize % ALIGNMENT == 0
            end = e.offset + e.numel
        assert end <= found.numel(dtype) < end + ALIGNMENT
    assert [d.itemsize for d in found.dtypes] == sorted((d.itemsize for d in found.dtypes), reverse=True)
    assert found.num_values == sum(math.prod(shape) for _, shape in model.values())
    assert found.num_bytes == sum(math.prod(shape) * dtype.itemsize for dtype, shape in model.values())


@pytest.mark.slow
@given(models)
def test_json_gives_the_layout_back(model):
    tensors = tensors_of(model)
    found = Layout.of(tensors | {"tied": next(iter(tensors.values()), torch.ones(1)), "zz": torch.ones(2)}, frozen=["zz"])
    assert Layout.from_json(found.to_json()) == found


@pytest.mark.parametrize("entry", ['["w","no_dtype",[2],0,2]', '["w","float32",[2],0,3]', '["w"]', "1"])
def test_a_text_that_is_no_layout_is_refused(entry):
    for text in ("", "{}", "[1]", '{"entries":[' + entry + '],"aliases":{},"frozen":[]}'):
        with pytest.raises(LayoutError):
            Layout.from_json(text)


def test_tied_weights_are_one_entry_and_views_of_one_memory():
    weights = state()
    flat = FlatWeights.of(weights)
    assert flat.layout.aliases == {"head": "embedding"}
    assert flat.weights["head"].data_ptr() == flat.weights["embedding"].data_ptr() != weights["head"].data_ptr()
    assert_bits(flat.weights, weights)


def test_a_transposed_view_is_no_alias():
    square = torch.arange(9.0).view(3, 3)
    flat = FlatWeights.of({"w": square, "t": square.t()})
    assert flat.layout.aliases == {}
    assert_bits(flat.weights, {"w": square, "t": square.t()})


def test_all_values_of_a_dtype_share_one_buffer():
    flat = FlatWeights.of(state())
    assert set(flat.buffers) == {torch.bfloat16, torch.float16, torch.float32, torch.int64, torch.bool}
    for e in flat.layout.entries:
        buffer = flat.buffers[e.dtype]
        assert flat.weights[e.name].untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
    assert flat.num_bytes == sum(buffer.nbytes for buffer in flat.buffers.values())


def test_frozen_tensors_are_held_by_reference_and_never_read():
    ghost = torch.empty(1 << 40, device="meta")
    flat = FlatWeights.of({"w": torch.ones(3), "ghost": ghost}, frozen=["ghost"])
    assert flat.weights["ghost"].is_meta
    assert flat.layout.num_bytes == 12
    assert encode(flat, {"w": torch.zeros(3), "ghost": ghost}).num_changed == 3


def test_masters_take_the_dtype_of_the_layout_and_buffers_keep_theirs():
    masters = {"w": torch.tensor([1.0, 1 + 2**-9, -0.0]), "steps": torch.tensor(7), "flag": torch.tensor([True])}
    flat = FlatWeights.of(masters, dtype=torch.bfloat16)
    assert_bits(flat.weights, masters | {"w": masters["w"].bfloat16()})


@pytest.mark.slow
@given(st.integers(0, 30), st.lists(st.integers(0, 30), max_size=4), st.randoms())
def test_shards_in_any_order_make_the_layout_of_the_whole(numel, cuts, random):
    cuts = sorted(min(cut, numel) for cut in cuts)
    shards = [
        Layout.of({"w": torch.zeros(b - a)}, shards={"w": Shard(shape=(numel,), start=a, stop=b)})
        for a, b in zip([0, *cuts], [*cuts, numel], strict=True)
    ]
    random.shuffle(shards)
    assert Layout.union(shards) == Layout.of({"w": torch.zeros(numel)})


def test_a_shard_is_held_as_a_flat_view():
    flat = FlatWeights.of({"w": torch.arange(2.0, 6.0).view(2, 2)}, shards={"w": Shard(shape=(3, 2), start=2, stop=6)})
    assert flat.weights["w"].tolist() == [2, 3, 4, 5]


@pytest.mark.parametrize(
    "parts",
    [
        [entry(stop=4), entry(start=3)],
        [entry(stop=2), entry(start=3)],
        [entry(stop=3), entry(start=3, dtype=torch.float16)],
        [entry(stop=3), entry(start=3, shape=(3, 2))],
    ],
)
def test_shards_that_do_not_make_a_whole_are_refused(parts):
    with pytest.raises(LayoutError, match="w: names or ranges"):
        Layout.union([layout(part) for part in parts])


@pytest.mark.parametrize(
    "make",
    [
        lambda: layout(entry(), entry()),
        lambda: layout(entry(), entry(dtype=torch.float16)),
        lambda: layout(entry(), aliases={"w": "w"}),
        lambda: layout(entry(), aliases={"v": "u"}),
        lambda: layout(entry(), frozen=frozenset("w")),
        lambda: layout(entry(), aliases={"v": "w"}, frozen=frozenset("v")),
        lambda: layout(entry(stop=7)),
        lambda: layout(entry(start=-1)),
        lambda: layout(entry(start=4, stop=3)),
        lambda: layout(entry(dtype=torch.complex128)),
        lambda: Layout.of({"w": torch.ones(2)}, frozen=["v"]),
        lambda: Layout.of({"w": torch.ones(2)}, shards={"w": Shard(shape=(6,), start=0, stop=3)}),
        lambda: Layout.union([layout(entry(), aliases={"v": "w"}), layout(entry("u"), aliases={"v": "u"})]),
        lambda: FlatWeights(layout(entry()), {torch.float32: torch.zeros(6)}),
    ],
)
def test_names_and_ranges_that_contradict_each_other_are_refused(make):
    with pytest.raises(LayoutError):
        make()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"w": torch.zeros(3, 2)}, r"w: .*\(3, 2\).*\(2, 3\)"),
        ({"w": torch.zeros(2, 3, dtype=torch.int64)}, "w: .*int64"),
        ({"n": torch.tensor(1.0)}, "n: .*float32.*int64"),
        ({"x": torch.ones(1)}, "x: .*the layout lacks"),
        ({"z": torch.ones(2, 3)}, "z: .*differ from those of w"),
        ({"z": torch.zeros(3, 2)}, "z: .*differ from those of w"),
        ({"w": None, "z": None}, "w: .*no such tensor"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name_and_nothing_changes(change, words):
    w = torch.zeros(2, 3)
    weights = {"w": w, "z": w, "n": torch.tensor(1)}
    flat = FlatWeights.of(weights)
    new = {name: tensor for name, tensor in (weights | change).items() if tensor is not None}
    for take in (flat.load, lambda new: encode(flat, new)):
        with pytest.raises(LayoutError, match=words):
            take(new)
    assert_bits(flat.weights, weights)
    assert flat.digest == flat.full_digest()


def test_tied_names_may_come_as_equal_copies():
    w = torch.tensor([math.nan, -0.0])
    flat = FlatWeights.of({"w": w, "tied": w})
    assert encode(flat, {"w": w, "tied": w.clone()}).num_changed == 0


@pytest.mark.parametrize("name", ["a", "z"])
def test_tied_weights_may_come_under_any_one_of_their_names(name):
    w = torch.ones(3)
    flat = FlatWeights.of({"a": w, "z": w})
    assert encode(flat, {name: torch.zeros(3)}).num_changed == 3
    assert_bits(flat.weights, {"a": torch.zeros(3), "z": torch.zeros(3)})


def test_differences_of_layouts_are_told_in_words():
    mine = layout(entry("a"), entry("b"), aliases={"c": "a"}, frozen=frozenset("d"))
    assert mine.difference(layout(entry("a"), entry("b"), aliases={"c": "a"}, frozen=frozenset("d"))) == ""
    assert mine.difference(layout(entry("a"))) == "b is missing"
    assert mine.difference(layout(entry("a"), entry("b"), entry("x"))) == "x is unknown here"
    other = layout(entry("a"), entry("b", dtype=torch.float16))
    assert mine.difference(other) == "b is torch.float16 (2, 3)[0:6] instead of torch.float32 (2, 3)[0:6]"
    assert "tied" in mine.difference(layout(entry("a"), entry("b")))
    assert "frozen" in mine.difference(layout(entry("a"), entry("b"), aliases={"c": "a"}))


def test_a_copy_without_a_digest_takes_no_patch_until_it_is_loaded():
    weights = {"w": torch.ones(3)}
    flat = FlatWeights.empty(Layout.of(weights))
    with pytest.raises(ExactnessError, match="holds no version"):
        encode(flat, weights)
    flat.load(weights)
    assert encode(flat, weights).num_changed == 0
