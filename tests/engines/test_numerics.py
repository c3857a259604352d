import math
import struct

import pytest
import torch
from beartype import beartype
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import jaxtyped

from oldlogits.core.errors import ConfigError
from oldlogits.engines.embedded import numerics
from oldlogits.engines.embedded.numerics import check_numerics

round_linear = jaxtyped(typechecker=beartype)(numerics.round_linear)
round_other = jaxtyped(typechecker=beartype)(numerics.round_other)
round_rows_to_e4m3 = jaxtyped(typechecker=beartype)(numerics.round_rows_to_e4m3)

LOW = ["fp8", "int8", "int4", "fp8_dynamic"]
LARGEST = {"fp8": 448.0, "fp8_dynamic": 448.0, "int8": 127.0, "int4": 7.0}

# Every finite e4m3 code, in order of value: 4 exponent bits with bias 7, 3 mantissa bits, subnormals at exponent 0.
E4M3 = [
    (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    for exponent in range(16)
    for mantissa in range(8)
    if (exponent, mantissa) != (15, 7)
]

values = st.floats(-1e4, 1e4, width=32, allow_subnormal=False).filter(lambda x: x == 0 or abs(x) > 1e-6)
rows = st.lists(values, min_size=1, max_size=8)


def f32(x: float) -> float:
    return struct.unpack("f", struct.pack("f", x))[0]


def to_e4m3(x: float) -> float:
    below = max(i for i, code in enumerate(E4M3) if code <= abs(x))
    if below + 1 == len(E4M3):
        return math.copysign(E4M3[below], x)
    down, up = abs(x) - E4M3[below], E4M3[below + 1] - abs(x)
    code = below if down < up or (down == up and below % 2 == 0) else below + 1
    return math.copysign(E4M3[code], x)


def rounded_row(row: list[float], name: str) -> list[float]:
    amax = max(abs(x) for x in row)
    scale = f32(amax / LARGEST[name]) if amax else 1.0
    nearest = to_e4m3 if name.startswith("fp8") else round  # Python's round takes ties to even
    return [f32(nearest(f32(x / scale)) * scale) for x in row]


def to_bf16(x: float) -> float:
    bits = struct.unpack("I", struct.pack("f", x))[0]
    bits += 0x7FFF + (bits >> 16 & 1)  # to nearest, ties to even, on the upper 16 bits
    return struct.unpack("f", struct.pack("I", bits & 0xFFFF0000))[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", LOW)
@settings(max_examples=60, deadline=None)
@given(first=rows, data=st.data())
def test_each_output_channel_is_rounded_with_its_own_scale(name, first, data):
    second = data.draw(st.lists(values, min_size=len(first), max_size=len(first)))
    result = round_linear(torch.tensor([first, second]), name)
    assert result.tolist() == [rounded_row(first, name), rounded_row(second, name)]


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(rows)
def test_bf16_rounds_every_weight_to_its_upper_sixteen_bits(row):
    expected = [to_bf16(x) for x in row]
    assert round_linear(torch.tensor([row]), "bf16").tolist() == [expected]
    assert round_other(torch.tensor(row), "bf16").tolist() == expected


@pytest.mark.parametrize("name", ["fp32", *LOW])
def test_norms_biases_and_embeddings_are_rounded_by_bf16_only(name):
    tensor = torch.tensor([0.1, 1.2345678, -3.3])
    assert torch.equal(round_other(tensor, name), tensor)


def test_known_values_of_each_numerics():
    row = torch.tensor([[1.0, 0.3, -0.26, 0.0]])
    assert round_linear(row, "int4").tolist()[0] == pytest.approx([1.0, 2 / 7, -2 / 7, 0.0])  # 2.1 and -1.82 sevenths
    assert round_linear(row, "int8").tolist()[0] == pytest.approx([1.0, 38 / 127, -33 / 127, 0.0])  # 38.1, -33.02
    assert round_linear(row, "fp8").tolist()[0] == pytest.approx([1.0, 128 / 448, -120 / 448, 0.0])  # 134.4, -116.5
    assert round_linear(row, "fp32").tolist() == row.tolist()


@pytest.mark.parametrize("name", ["fp32", "bf16", *LOW])
def test_a_rounded_weight_shares_no_memory_with_the_live_one(name):
    live = torch.tensor([[1.0, 2.0]])
    linear, other = round_linear(live, name), round_other(live, name)
    live.zero_()
    assert linear[0, 1] == 2.0
    assert other[0, 1] == 2.0


@pytest.mark.parametrize("name", LOW)
def test_rounding_twice_changes_nothing_more(name):
    weight = torch.randn(5, 33, generator=torch.Generator().manual_seed(0))
    once = round_linear(weight, name)
    assert torch.allclose(round_linear(once, name), once, rtol=3e-7, atol=0)
    assert not torch.equal(once, weight)


@pytest.mark.parametrize("name", LOW)
def test_a_row_of_zeros_stays_zero(name):
    assert round_linear(torch.zeros(2, 3), name).tolist() == [[0.0] * 3] * 2


def test_activations_are_rounded_per_token():
    tokens = [[448.0, 100.3, -0.7], [0.448, 0.1003, -0.0007]]
    expected = [rounded_row(row, "fp8") for row in (list(map(f32, row)) for row in tokens)]
    assert round_rows_to_e4m3(torch.tensor(tokens)).tolist() == expected


@pytest.mark.parametrize("weight", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_are_computed_in_float32(weight):
    assert round_linear(torch.ones(1, 2, dtype=weight), "fp32").dtype == torch.float32


def test_an_unknown_numerics_is_refused_with_those_allowed():
    with pytest.raises(ConfigError, match=r"'int3'; allowed: fp32, bf16, fp8, int8, int4, fp8_dynamic"):
        check_numerics("int3")
    assert check_numerics("int8") == "int8"
