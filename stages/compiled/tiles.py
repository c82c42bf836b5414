"""Dot products of a few float32 rows with a few weight rows, written in LLVM's vector code: their sums stay in registers.

A row's bits do not depend on the tile it is in: the sum over its inputs has the same order in each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

HAS_AVX512 = bool(get_host_cpu_features().get("avx512f"))
LANES = 16 if HAS_AVX512 else 8
"""Inputs that are multiplied at once, a vector register of float32; a product has a multiple of them."""
GROUP = 64
"""Inputs of an int4 weight row that share a scale and an offset."""

_INDEX, _FLOAT = ir.IntType(64), ir.FloatType()
_FLOATS, _BITS = ir.VectorType(_FLOAT, LANES), ir.VectorType(ir.IntType(32), LANES)
_HALVES, _BYTES = ir.VectorType(ir.IntType(16), LANES), ir.VectorType(ir.IntType(8), LANES)
_ZEROS = ir.Constant(_FLOATS, [0.0] * LANES)


def tile(rows: int, streams: int) -> Any:
    """`rows` x `streams` dot products with weights that are float32, bfloat16 (uint16) or int8, as the type of `element` says.

    Addresses: x, contiguous rows of `size`; half of the weight rows from `first` on, half from `second` on, `stride` bytes apart; and
    sums, `pitch` bytes apart for rows and `step` for weight rows.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x, first, second, stride, size, sums, pitch, step, _ = args
        code, element = _Code(builder), signature.args[-1]
        row_starts = code.places(x, rows, code.times(size, 4))
        weight_starts = [place for start in (first, second) for place in code.places(start, streams // 2, stride)]

        def body(k: Any, totals: Sequence[Any]) -> list[Any]:
            offset, weight_offset = code.times(k, 4), code.times(k, element.bitwidth // 8)
            weights = [code.load_weights(builder.add(start, weight_offset), element) for start in weight_starts]
            summed = []
            for row, start in enumerate(row_starts):
                values = code.load(builder.add(start, offset), _FLOATS, 4)
                of_row = totals[row * streams : (row + 1) * streams]
                summed += [code.add_product(total, values, w) for total, w in zip(of_row, weights, strict=True)]
            return summed

        code.store(code.loop(size, LANES, rows * streams, body), rows, streams, sums, pitch, step)
        return context.get_dummy_value()

    @intrinsic  # type: ignore[untyped-decorator]
    def multiply(
        typing_context: Any, x: Any, first: Any, second: Any, stride: Any, size: Any, sums: Any, pitch: Any, step: Any, element: Any
    ) -> Any:  # fmt: skip
        return types.void(*[types.int64] * 8, element), generate

    return multiply


def int4_tile(rows: int, streams: int) -> Any:
    """The same with int4 weights, whose values are q · scale + offset.

    Of 2 · LANES inputs the bytes' lower halves are q of the first LANES, the upper ones of the others. Scales, at addresses of their own
    `scale_stride` bytes apart: a float32 scale and offset for each GROUP inputs.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x, first, second, stride, first_scales, second_scales, scale_stride, size, sums, pitch, step = args
        code = _Code(builder)
        half = streams // 2
        row_starts = code.places(x, rows, code.times(size, 4))
        weight_starts = [place for start in (first, second) for place in code.places(start, half, stride)]
        scale_starts = [
            place for start in (first_scales, second_scales) for place in code.places(start, half, scale_stride)
        ]

        def body(k: Any, totals: Sequence[Any]) -> list[Any]:
            summed, group_offset = list(totals), builder.lshr(k, _INDEX(3))
            assert GROUP == 8 * 8  # eight bytes of scales for so many inputs
            scales = [code.spread_pair(builder.add(start, group_offset)) for start in scale_starts]
            for begin in range(0, GROUP, 2 * LANES):
                at = builder.add(k, _INDEX(begin))
                byte_offset = builder.lshr(at, _INDEX(1))
                offsets = [code.times(builder.add(at, _INDEX(part * LANES)), 4) for part in range(2)]
                for stream, start in enumerate(weight_starts):
                    weights = code.load_int4(builder.add(start, byte_offset), *scales[stream])
                    for row, x_start in enumerate(row_starts):
                        index = row * streams + stream
                        for offset, weight in zip(offsets, weights, strict=True):
                            values = code.load(builder.add(x_start, offset), _FLOATS, 4)
                            summed[index] = code.add_product(summed[index], values, weight)
            return summed

        code.store(code.loop(size, GROUP, rows * streams, body), rows, streams, sums, pitch, step)
        return context.get_dummy_value()

    @intrinsic  # type: ignore[untyped-decorator]
    def multiply(
        typing_context: Any, x: Any, first: Any, second: Any, stride: Any, first_scales: Any, second_scales: Any,
        scale_stride: Any, size: Any, sums: Any, pitch: Any, step: Any
    ) -> Any:  # fmt: skip
        return types.void(*[types.int64] * 11), generate

    return multiply


class _Code:
    """What both kinds of tiles are written with."""

    def __init__(self, builder: Any) -> None:
        self._builder = builder

    def times(self, value: Any, factor: int) -> Any:
        return self._builder.mul(value, _INDEX(factor))

    def places(self, start: Any, count: int, distance: Any) -> list[Any]:
        """Addresses `distance` bytes apart."""
        return [self._builder.add(start, self._builder.mul(_INDEX(index), distance)) for index in range(count)]

    def load(self, address: Any, kind: Any, align: int) -> Any:
        return self._builder.load(self._builder.inttoptr(address, kind.as_pointer()), align=align)

    def load_weights(self, address: Any, element: Any) -> Any:
        """LANES weights as float32."""
        builder = self._builder
        if element == types.float32:
            return self.load(address, _FLOATS, 4)
        if element == types.int8:
            return builder.sitofp(builder.sext(self.load(address, _BYTES, 1), _BITS), _FLOATS)
        halves = builder.zext(self.load(address, _HALVES, 2), _BITS)
        return builder.bitcast(builder.shl(halves, ir.Constant(_BITS, [16] * LANES)), _FLOATS)

    def load_int4(self, address: Any, scale: Any, offset: Any) -> tuple[Any, Any]:
        """2 · LANES of them as float32."""
        builder = self._builder
        both = builder.zext(self.load(address, _BYTES, 1), _BITS)
        lower = builder.and_(both, ir.Constant(_BITS, [15] * LANES))
        upper = builder.lshr(both, ir.Constant(_BITS, [4] * LANES))
        lower, upper = (self.add_product(offset, builder.sitofp(q, _FLOATS), scale) for q in (lower, upper))
        return lower, upper

    def spread_pair(self, address: Any) -> tuple[Any, Any]:
        """The float32 at an address in all lanes, and so the next one."""
        builder = self._builder
        spread = []
        for place in (address, builder.add(address, _INDEX(4))):
            value = builder.load(builder.inttoptr(place, _FLOAT.as_pointer()), align=4)
            one = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), value, ir.IntType(32)(0))
            spread.append(builder.shuffle_vector(one, one, ir.Constant(_BITS, [0] * LANES)))
        return spread[0], spread[1]

    def add_product(self, total: Any, one: Any, other: Any) -> Any:
        """total + one · other, in one instruction where there is one."""
        product = self._builder.fmul(one, other, flags=("contract",))
        return self._builder.fadd(total, product, flags=("contract",))

    def loop(self, size: Any, step: int, num_totals: int, body: Any) -> list[Any]:
        """Totals after `body` was done for 0, `step`, … below `size`, once at least."""
        builder = self._builder
        before, loop, end = builder.block, builder.append_basic_block(), builder.append_basic_block()
        builder.branch(loop)
        builder.position_at_end(loop)
        k = builder.phi(_INDEX)
        totals = [builder.phi(_FLOATS) for _ in range(num_totals)]
        summed: list[Any] = body(k, totals)
        following = builder.add(k, _INDEX(step))
        k.add_incoming(_INDEX(0), before)
        k.add_incoming(following, loop)
        for total, new in zip(totals, summed, strict=True):
            total.add_incoming(_ZEROS, before)
            total.add_incoming(new, loop)
        builder.cbranch(builder.icmp_signed("<", following, size), loop, end)
        builder.position_at_end(end)
        return summed

    def store(self, summed: Sequence[Any], rows: int, streams: int, sums: Any, pitch: Any, step: Any) -> None:
        """The sum of each total's lanes, where it belongs."""
        builder = self._builder
        kind = ir.FunctionType(_FLOAT, (_FLOAT, _FLOATS))
        sum_of = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.fadd.v{LANES}f32")
        places = [place for row in self.places(sums, rows, pitch) for place in self.places(row, streams, step)]
        for place, lanes in zip(places, summed, strict=True):
            total = builder.call(sum_of, (ir.Constant(_FLOAT, -0.0), lanes), fastmath=("reassoc",))
            builder.store(total, builder.inttoptr(place, _FLOAT.as_pointer()))
