"""Vector code on plain addresses: what the training kernels add to `gigavim_kernels.cpu.simd`."""

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

from gigavim_kernels.cpu.simd import LANES, Simd, Value, cgutils

I64 = ir.IntType(64)
_FLOAT, _I32 = ir.FloatType(), ir.IntType(32)
_VECTOR, _ORDER = ir.VectorType(_FLOAT, LANES), ir.VectorType(_I32, LANES)


class Lanes(Simd):
    """Writes operations on vectors that are given by their address, an int64."""

    def at(self, base: Value, floats: Value) -> Value:
        """Return the address `floats` float32 places after `base`."""
        return self.builder.add(base, self.builder.shl(floats, self.index(2)))

    def row(self, base: Value, k: Value, stride: Value) -> Value:
        """Return the address of row k of a matrix whose rows lie `stride` places apart."""
        return self.at(base, self.builder.mul(k, stride))

    def load(self, address: Value) -> Value:
        """Read sixteen floats."""
        return self.builder.load(self._pointer(address, _VECTOR), align=4)

    def store(self, address: Value, value: Value) -> None:
        """Write sixteen floats."""
        self.builder.store(value, self._pointer(address, _VECTOR), align=4)

    def splat_at(self, address: Value) -> Value:
        """Fill a vector with one float of memory."""
        return self.splat(self.builder.load(self._pointer(address, _FLOAT), align=4))

    def prefetch(self, address: Value, *, write: bool = False) -> None:
        """Ask for a cache line; any address will do."""
        byte = ir.IntType(8)
        kind = ir.FunctionType(ir.VoidType(), [byte.as_pointer(), _I32, _I32, _I32])
        fetch = cgutils.get_or_insert_function(self.builder.module, kind, "llvm.prefetch.p0")
        hints = [ir.Constant(_I32, value) for value in (int(write), 3, 1)]
        self.builder.call(fetch, [self._pointer(address, byte), *hints])

    def sigmoid(self, x: Value) -> Value:
        """Return 1 / (1 + e^-x)."""
        growth = self.exp(self.builder.fneg(x))
        return self.reciprocal(self.add(self.constant(1.0), growth))

    def lane_sums(self, vectors: Sequence[Value]) -> Value:
        """Sixteen vectors to one, whose lane i is the sum over the lanes of vector i."""
        even = ir.Constant(_ORDER, list(range(0, 2 * LANES, 2)))
        odd = ir.Constant(_ORDER, list(range(1, 2 * LANES, 2)))
        shuffle, level = self.builder.shuffle_vector, list(vectors)
        while len(level) > 1:
            pairs = zip(level[::2], level[1::2], strict=True)
            level = [self.add(shuffle(a, b, even), shuffle(a, b, odd)) for a, b in pairs]
        return level[0]

    def each(self, count: Value, body: Callable[[Value], None], *, down: bool = False) -> None:
        """Call `body(k)` for k = 0 .. count - 1, or from count - 1 down to 0."""
        with self.loop(count) as k:
            last = self.builder.sub(count, self.index(1))
            body(self.builder.sub(last, k) if down else k)

    def _pointer(self, address: Value, kind: Any) -> Value:
        return self.builder.inttoptr(address, kind.as_pointer())
