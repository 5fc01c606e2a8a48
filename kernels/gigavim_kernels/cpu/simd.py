"""Vector code for numba: explicit vectors of 16 floats in LLVM IR.

LLVM maps <16 x float> to one AVX-512, two AVX or four NEON registers, so one source serves every
processor, and the compiler's own choice of a vector width plays no part.

Arrays of uint16 hold the bits of bfloat16: loads widen them to float32, stores round them to the
nearest, ties away from zero.

The exponential rounds its argument by adding and subtracting 1.5 * 2^23. Reassociation would fold
that away without a word, so no operation here carries the flags that allow it, nor those that
assume NaN away.
"""

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import extending, types
from numba.core import cgutils as untyped_cgutils

LANES = 16

Value = Any
"""An LLVM value."""

cgutils: Any = untyped_cgutils

_FLAGS = ("nsz", "contract")
_FLOAT, _I16, _I32, _I64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_FLOATS, _HALVES, _INTS = (ir.VectorType(t, LANES) for t in (_FLOAT, _I16, _I32))

_ROUND = 12582912.0  # 1.5 * 2^23: adding it leaves the nearest integer in the low mantissa bits
_LOG2_E = 1.4426950408889634
# Minimax fits with constant term 1: 2^f on [-0.5, 0.5], and log(1 + e) / e on [0, 1].
_EXP2 = (
    0.6931470036506653,
    0.24022242426872253,
    0.05550733581185341,
    0.009671512991189957,
    0.001326472731307149,
)
_LOG1P = (
    0.9999999403953552,
    -0.4999949336051941,
    0.3331909775733948,
    -0.2484298199415207,
    0.19106008112430573,
    -0.13663247227668762,
    0.07822596281766891,
    -0.02950524352490902,
    0.005232694558799267,
)


def jit(function: Callable[..., Any], *, fastmath: Collection[str] = ()) -> Any:
    """Compile with the GIL released; keep the machine code on disk where a place can be found.

    numba knows kept code by the function's name and its file's date. Code from this file is in it
    too, so the name carries a digest of this file.
    """
    digest = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]
    function.__qualname__ = f"{function.__qualname__}_{digest}"
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": set(fastmath)}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # numba finds no writable folder
        return numba.njit(**options)(function)


def intrinsic(function: Callable[..., Any]) -> Any:
    """Let compiled functions call what `function` generates; see `numba.extending.intrinsic`."""
    return extending.intrinsic(function)


class Simd:
    """Writes vector operations with a builder."""

    def __init__(self, context: Any, builder: Any) -> None:
        self.context, self.builder = context, builder

    def index(self, value: int) -> Value:
        """Return an integer constant for rows and columns."""
        return ir.Constant(_I64, value)

    def constant(self, value: float) -> Value:
        """Return a vector of one value."""
        return ir.Constant(_FLOATS, [float(np.float32(value))] * LANES)

    def ints(self, value: int) -> Value:
        """Return a vector of one 32-bit integer."""
        return ir.Constant(_INTS, [value] * LANES)

    def splat(self, scalar: Value) -> Value:
        """Fill a vector with a scalar float."""
        empty = ir.Constant(_FLOATS, ir.Undefined)
        single = self.builder.insert_element(empty, scalar, ir.Constant(_I32, 0))
        return self.builder.shuffle_vector(single, empty, ir.Constant(_INTS, [0] * LANES))

    def add(self, a: Value, b: Value) -> Value:
        """Return a + b."""
        return self.builder.fadd(a, b, flags=_FLAGS)

    def sub(self, a: Value, b: Value) -> Value:
        """Return a - b."""
        return self.builder.fsub(a, b, flags=_FLAGS)

    def mul(self, a: Value, b: Value) -> Value:
        """Return a * b."""
        return self.builder.fmul(a, b, flags=_FLAGS)

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """Return a * b + c."""
        kind = ir.FunctionType(_FLOATS, [_FLOATS] * 3)
        name = f"llvm.fmuladd.v{LANES}f32"
        return self.builder.call(
            cgutils.get_or_insert_function(self._module, kind, name), [a, b, c]
        )

    def max(self, a: Value, b: Value) -> Value:
        """Return the greater; b where either is NaN."""
        return self.builder.select(self.builder.fcmp_ordered(">", a, b), a, b)

    def min(self, a: Value, b: Value) -> Value:
        """Return the smaller; b where either is NaN."""
        return self.builder.select(self.builder.fcmp_ordered("<", a, b), a, b)

    def polynomial(self, coefficients: tuple[float, ...], x: Value) -> Value:
        """Return c0 + c1 x + c2 x^2 + ... by Horner's rule."""
        result = self.constant(coefficients[-1])
        for coefficient in coefficients[-2::-1]:
            result = self.fma(result, x, self.constant(coefficient))
        return result

    def exp2(self, x: Value) -> Value:
        """Return 2^x; x is raised to -126 where it is less, and must not exceed 127."""
        x = self.max(x, self.constant(-126.0))
        shifted = self.builder.fadd(x, self.constant(_ROUND))
        whole = self.builder.fsub(shifted, self.constant(_ROUND))
        return self._exp2_parts(shifted, self.builder.fsub(x, whole))

    def exp2_product(self, a: Value, b: Value) -> Value:
        """Return 2^(a b) where |a b| <= 126 is known: two operations fewer."""
        shifted = self.fma(a, b, self.constant(_ROUND))
        whole = self.builder.fsub(shifted, self.constant(_ROUND))
        return self._exp2_parts(shifted, self.fma(a, b, self.builder.fneg(whole)))

    def _exp2_parts(self, shifted: Value, fraction: Value) -> Value:
        b = self.builder
        power = b.bitcast(self.polynomial((1.0, *_EXP2), fraction), _INTS)
        exponent = b.shl(b.bitcast(shifted, _INTS), self.ints(23))
        return b.bitcast(b.add(power, exponent), _FLOATS)

    def exp(self, x: Value) -> Value:
        """Return e^x, at most 2^100."""
        return self.exp2(self.min(self.mul(x, self.constant(_LOG2_E)), self.constant(100.0)))

    def reciprocal(self, x: Value) -> Value:
        """Return 1 / x of x in [1, 2^101] by Newton's steps, three times as fast as a division."""
        b = self.builder
        guess = b.bitcast(b.sub(self.ints(0x7EF311C7), b.bitcast(x, _INTS)), _FLOATS)
        for _ in range(3):  # relative error 0.12, 0.014, 2e-4, 4e-8
            error = self.fma(b.fneg(x), guess, self.constant(1.0))
            guess = self.fma(guess, error, guess)
        return guess

    def silu(self, x: Value) -> Value:
        """Return x / (1 + e^-x)."""
        growth = self.exp(self.builder.fneg(x))
        return self.mul(x, self.reciprocal(self.add(self.constant(1.0), growth)))

    def softplus(self, x: Value) -> Value:
        """Return log(1 + e^x) = max(x, 0) + log(1 + e^-|x|)."""
        small = self.exp(self.min(x, self.builder.fneg(x)))
        ramp = self.max(self.constant(0.0), x)  # NaN stays NaN
        return self.fma(self.polynomial(_LOG1P, small), small, ramp)

    def largest_lane(self, x: Value) -> Value:
        """Return the greatest of the lanes."""
        b = self.builder
        for half in (8, 4, 2, 1):
            order = [(lane + half) % LANES for lane in range(LANES)]
            x = self.max(x, b.shuffle_vector(x, x, ir.Constant(_INTS, order)))
        return b.extract_element(x, ir.Constant(_I32, 0))

    def variable(self, initial: Value) -> "Variable":
        """Return a vector that loops may change."""
        return Variable(self.builder, initial)

    @contextmanager
    def loop(self, count: Value, step: int = 1) -> Iterator[Value]:
        """Repeat the code written inside, for an index from 0 up to count (exclusive)."""
        span = (self.index(0), count, self.index(step))
        with cgutils.for_range_slice(self.builder, *span, intp=_I64) as (index, _):
            yield index

    @property
    def _module(self) -> Any:
        return self.builder.module


class Variable:
    """A vector on the stack, which LLVM keeps in a register."""

    def __init__(self, builder: Any, initial: Value) -> None:
        self._builder = builder
        with builder.goto_entry_block():
            self._place = builder.alloca(_FLOATS)
        self.set(initial)

    def get(self) -> Value:
        """Return the present value."""
        return self._builder.load(self._place)

    def set(self, value: Value) -> None:
        """Change the value."""
        self._builder.store(value, self._place)


class Rows:
    """An array argument of an intrinsic, (rows, columns) of float32 or bfloat16 bits."""

    def __init__(self, simd: Simd, kind: Any, value: Value) -> None:
        if not (isinstance(kind, types.Array) and kind.ndim == 2):
            raise TypeError(f"expected a matrix, got {kind}")
        self._simd, self._builder = simd, simd.builder
        proxy = cgutils.create_struct_proxy(kind)(simd.context, simd.builder, value=value)
        self._base = simd.builder.ptrtoint(proxy.data, _I64)
        self._stride = cgutils.unpack_tuple(simd.builder, proxy.strides)[0]
        self._half = kind.dtype == types.uint16
        if not self._half and kind.dtype != types.float32:
            raise TypeError(f"expected float32 or bfloat16 bits, got {kind.dtype}")

    def load(self, row: Value, column: Value) -> Value:
        """Return the 16 columns of a row that begin at `column`."""
        b = self._builder
        if not self._half:
            return b.load(self._pointer(row, column, _FLOATS), align=4)
        bits = b.zext(b.load(self._pointer(row, column, _HALVES), align=2), _INTS)
        return b.bitcast(b.shl(bits, self._simd.ints(16)), _FLOATS)

    def store(self, row: Value, column: Value, value: Value) -> None:
        """Write 16 columns of a row."""
        b, simd = self._builder, self._simd
        if not self._half:
            b.store(value, self._pointer(row, column, _FLOATS), align=4)
            return
        bits = b.add(b.bitcast(value, _INTS), simd.ints(0x8000))
        halves = b.trunc(b.lshr(bits, simd.ints(16)), _HALVES)
        b.store(halves, self._pointer(row, column, _HALVES), align=2)

    def splat(self, row: Value, column: Value) -> Value:
        """Return a vector filled with one element of a float32 matrix."""
        return self._simd.splat(self._builder.load(self._pointer(row, column, _FLOAT), align=4))

    def prefetch(self, row: Value, column: Value) -> None:
        """Ask for the cache line of an element; the row need not exist."""
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, _I32, _I32, _I32])
        fetch = cgutils.get_or_insert_function(self._builder.module, kind, "llvm.prefetch.p0")
        place = self._pointer(row, column, ir.IntType(8))
        self._builder.call(fetch, [place, *(ir.Constant(_I32, i) for i in (0, 3, 1))])

    def _pointer(self, row: Value, column: Value, kind: Any) -> Value:
        b = self._builder
        size = self._simd.index(2 if self._half else 4)
        offset = b.add(b.mul(row, self._stride), b.mul(column, size))
        return b.inttoptr(b.add(self._base, offset), kind.as_pointer())


def matrices(simd: Simd, kinds: Sequence[Any], values: Sequence[Value]) -> list[Any]:
    """Return the `Rows` of arguments, None for those that are None."""
    return [
        None if isinstance(kind, types.NoneType) else Rows(simd, kind, value)
        for kind, value in zip(kinds, values)
    ]
