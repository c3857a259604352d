"""What the machine does in one step and Python cannot say: LLVM intrinsics and the compiler of `compiled.py`.

Only this file imports numba. A comparison of 64 values at a time is LLVM's to translate into what the machine has.
"""

# mypy: disable-error-code="untyped-decorator, no-any-return"

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from llvmlite import binding, ir
from numba import config, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

LANES: Final = 64
"""Values that are compared at once."""


def why_unusable() -> str:
    """Why the compiled loops are not to be used although numba is here; empty if they may be used."""
    return "numba's compiler is switched off (NUMBA_DISABLE_JIT)" if config.DISABLE_JIT else ""


def describe_machine() -> str:
    """Describe the machine as LLVM sees it."""
    features = binding.get_host_cpu_features()
    widest = next((f for f in ("avx512bw", "avx2", "neon", "sse4.2") if features.get(f)), "generic")
    return f"numba on {binding.get_host_cpu_name()} ({widest})"


def jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile when first called; without a folder that can be written, in every process anew."""
    try:
        return njit(cache=True, nogil=True, error_model="numpy")(function)
    except RuntimeError:
        return njit(nogil=True, error_model="numpy")(function)


@intrinsic
def changed(typing: Any, words: Any, i: Any, new: Any, j: Any, nan: Any) -> Any:
    """uint64: bit k is set where ``words[i + k]`` is not what `new` at ``j + k`` is as such a word, for 64 values."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        item = context.get_data_type(words.dtype)
        old = _loaded(context, builder, words, arguments[0], arguments[1], LANES)
        now = _loaded(context, builder, new, arguments[2], arguments[3], LANES)
        now = _rounded(builder, now, item, arguments[4], LANES) if new.dtype != words.dtype else now
        return builder.bitcast(builder.icmp_unsigned("!=", old, now), ir.IntType(LANES))

    return types.uint64(words, types.int64, new, types.int64, words.dtype), generate


@intrinsic
def word(typing: Any, new: Any, at: Any, nan: Any) -> Any:
    """Item `at` of new values as a word of the type of `nan`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        now = _loaded(context, builder, new, arguments[0], arguments[1], 1)
        item = context.get_data_type(nan)
        now = _rounded(builder, now, item, arguments[2], 1) if new.dtype != nan else now
        return builder.extract_element(now, ir.IntType(32)(0))

    return nan(new, types.int64, nan), generate


def _loaded(context: Any, builder: Any, array_type: Any, array: Any, at: Any, lanes: int) -> Any:
    """Values of an array from `at` on, as a vector."""
    kind = ir.VectorType(context.get_data_type(array_type.dtype), lanes)
    pointer = builder.gep(context.make_array(array_type)(context, builder, array).data, [at])
    return builder.load(builder.bitcast(pointer, kind.as_pointer()), typ=kind, align=array_type.dtype.bitwidth // 8)


def _rounded(builder: Any, bits: Any, item: Any, nan: Any, lanes: int) -> Any:
    """The bits of float32 as those of bfloat16: to nearest, ties to even; every NaN becomes the one given."""
    wide, narrow = ir.VectorType(ir.IntType(32), lanes), ir.VectorType(item, lanes)

    def all_of(number: int) -> Any:
        return ir.Constant(wide, [number] * lanes)

    upper = builder.lshr(bits, all_of(16))
    half = builder.add(builder.and_(upper, all_of(1)), all_of(0x7FFF))
    result = builder.trunc(builder.lshr(builder.add(bits, half), all_of(16)), narrow)
    is_nan = builder.icmp_unsigned(">", builder.and_(bits, all_of(0x7FFFFFFF)), all_of(0x7F800000))
    empty, zeros = ir.Constant(narrow, ir.Undefined), ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
    nans = builder.shuffle_vector(builder.insert_element(empty, nan, ir.IntType(32)(0)), empty, zeros)
    return builder.select(is_nan, nans, result)


@intrinsic
def trailing_zeros(typing: Any, bits: Any) -> Any:
    """The number of zero bits below the lowest one; `bits` is not 0."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], cgutils.true_bit)

    return types.int64(types.uint64), generate


@intrinsic
def ones(typing: Any, bits: Any) -> Any:
    """The number of bits that are set."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.int64(types.uint64), generate


@intrinsic
def prefetch(typing: Any, a: Any, i: Any) -> Any:
    """Ask for the cache line of ``a[i]``, to be written; anything but a fault if it does not exist."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.gep(context.make_array(signature.args[0])(context, builder, arguments[0]).data, [arguments[1]])
        number, byte = ir.IntType(32), ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        fetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(fetch, [builder.bitcast(pointer, byte), number(1), number(3), number(1)])
        return context.get_dummy_value()

    return types.void(a, types.int64), generate


@intrinsic
def load(typing: Any, address: Any, at: Any, like: Any) -> Any:
    """Item `at` of the values of the type of the array `like` that begin at `address`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        item = context.get_data_type(signature.args[2].dtype)
        pointer = builder.gep(builder.inttoptr(arguments[0], item.as_pointer()), [arguments[1]])
        return builder.load(pointer, typ=item, align=1)

    return like.dtype(types.int64, types.int64, like), generate
