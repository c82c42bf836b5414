"""Products with weights as the checkpoint has them: float32, or bfloat16 on a CPU without instructions for it.

A tile of rows and weight rows is multiplied in registers: each weight is read and widened once for up to six rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from stages.compiled.attention import exp
from stages.compiled.memory import ELEMENTS, compiled, narrowed, take, view, widened

HAS_AVX512 = bool(get_host_cpu_features().get("avx512f"))
LANES = 16 if HAS_AVX512 else 8
"""Inputs that are multiplied at once, a vector register of float32; a product has a multiple of them."""
STREAMS = 8
"""Weight rows that one row is multiplied with at once; a product has a multiple of them outputs."""
TILE_ROWS = 6
ROW_BLOCK = 16 * TILE_ROWS
"""Rows that an item has at most: a block of them stays in the cache that cores share while the weights pass by."""

_F = np.float32
_INDEX, _FLOAT = ir.IntType(64), ir.FloatType()
_FLOATS = ir.VectorType(_FLOAT, LANES)
_HALVES, _BITS = ir.VectorType(ir.IntType(16), LANES), ir.VectorType(ir.IntType(32), LANES)


def _tile(rows: int, streams: int) -> Any:
    """`rows` x `streams` dot products, their sums all in registers.

    A row's bits do not depend on the tile it is in: the sum over its inputs has the same order in each.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x, first, second, stride, size, sums, pitch, step, _ = args

        def load_floats(address: Any) -> Any:
            return builder.load(builder.inttoptr(address, _FLOATS.as_pointer()), align=4)

        def load_halves(address: Any) -> Any:
            halves = builder.load(builder.inttoptr(address, _HALVES.as_pointer()), align=2)
            bits = builder.shl(builder.zext(halves, _BITS), ir.Constant(_BITS, [16] * LANES))
            return builder.bitcast(bits, _FLOATS)

        def places(start: Any, count: int, distance: Any) -> list[Any]:
            return [builder.add(start, builder.mul(_INDEX(index), distance)) for index in range(count)]

        is_float = signature.args[-1] == types.float32
        load_weights = load_floats if is_float else load_halves
        row_starts = places(x, rows, builder.shl(size, _INDEX(2)))
        weight_starts = [place for start in (first, second) for place in places(start, streams // 2, stride)]

        before, loop, end = builder.block, builder.append_basic_block(), builder.append_basic_block()
        builder.branch(loop)
        builder.position_at_end(loop)
        k = builder.phi(_INDEX)
        totals = [builder.phi(_FLOATS) for _ in range(rows * streams)]
        offset = builder.shl(k, _INDEX(2))
        weight_offset = offset if is_float else builder.shl(k, _INDEX(1))
        weights = [load_weights(builder.add(start, weight_offset)) for start in weight_starts]
        summed = []
        for row, start in enumerate(row_starts):
            values = load_floats(builder.add(start, offset))
            for weight, total in zip(weights, totals[row * streams :], strict=False):
                product = builder.fmul(values, weight, flags=("contract",))  # one instruction with the sum
                summed.append(builder.fadd(total, product, flags=("contract",)))
        following = builder.add(k, _INDEX(LANES))
        k.add_incoming(_INDEX(0), before)
        k.add_incoming(following, loop)
        for total, new in zip(totals, summed, strict=True):
            total.add_incoming(ir.Constant(_FLOATS, [0.0] * LANES), before)
            total.add_incoming(new, loop)
        builder.cbranch(builder.icmp_signed("<", following, size), loop, end)

        builder.position_at_end(end)
        sum_of = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(_FLOAT, (_FLOAT, _FLOATS)), f"llvm.vector.reduce.fadd.v{LANES}f32"
        )
        sum_places = [place for row in places(sums, rows, pitch) for place in places(row, streams, step)]
        for place, lanes in zip(sum_places, summed, strict=True):
            total = builder.call(sum_of, (ir.Constant(_FLOAT, -0.0), lanes), fastmath=("reassoc",))
            builder.store(total, builder.inttoptr(place, _FLOAT.as_pointer()))
        return context.get_dummy_value()

    @intrinsic  # type: ignore[untyped-decorator]
    def multiply(
        typing_context: Any, x: Any, first: Any, second: Any, stride: Any, size: Any, sums: Any, pitch: Any, step: Any, element: Any
    ) -> Any:  # fmt: skip
        return types.void(*[types.int64] * 8, element), generate

    return multiply


# As many sums as AVX2 has registers for, less those for rows and weights; one row alone waits for memory, which likes many streams.
_1x8, _2x4, _3x4, _4x2, _5x2, _6x2 = (_tile(rows, s) for rows, s in ((1, 8), (2, 4), (3, 4), (4, 2), (5, 2), (6, 2)))


@njit(error_model="numpy")
def _multiply(rows, x, first, second, width, size, row_bytes, sums, pitch, element):  # type: ignore[no-untyped-def]
    """`width` dot products of each of `rows` rows, half of them with the weight rows from `first` on, half with those from `second`
    on. A stream of a tile goes on in the next tile: memory is fastest at long ones."""
    length = width // (8 if rows == 1 else 4 if rows <= 3 else 2)
    stride, step = length * row_bytes, length * 4
    for s in range(length):
        place, a, b = sums + s * 4, first + s * row_bytes, second + s * row_bytes
        if rows == 1:
            _1x8(x, a, b, stride, size, place, pitch, step, element)
        elif rows == 2:
            _2x4(x, a, b, stride, size, place, pitch, step, element)
        elif rows == 3:
            _3x4(x, a, b, stride, size, place, pitch, step, element)
        elif rows == 4:
            _4x2(x, a, b, stride, size, place, pitch, step, element)
        elif rows == 5:
            _5x2(x, a, b, stride, size, place, pitch, step, element)
        else:
            _6x2(x, a, b, stride, size, place, pitch, step, element)


@njit
def _silu(x):  # type: ignore[no-untyped-def]
    power = exp(-abs(x))
    sigmoid = _F(1) / (_F(1) + power)
    return x * (sigmoid if x >= 0 else power * sigmoid)


def product(dtype: str) -> Any:
    """The function, an item of which is a block of rows and a share of the outputs.

    Its arguments after the counter: addresses of float32 x [T, I], the weight [O, I], bias [O] or 0, residual [T, O] or 0, and out [T, O];
    then T, I, O, outputs of a share, and whether it is gated: the weight is then [2 O, I], and out silu(x @ gate.T) * (x @ up.T), without
    bias and residual. Rounded once.
    """
    element = ELEMENTS[dtype]
    item_bytes = np.dtype(element).itemsize

    def multiply(pointer):  # type: ignore[no-untyped-def]
        args = carray(pointer, 11)
        num_rows, inputs, outputs, share, gated = args[6], args[7], args[8], args[9], args[10]
        row_bytes = inputs * item_bytes
        num_shares = (outputs + share - 1) // share
        num_items = (num_rows + ROW_BLOCK - 1) // ROW_BLOCK * num_shares
        sums = np.empty((TILE_ROWS, share * 2), _F)
        while True:
            item = take(args, 1)
            if item >= num_items:
                break
            row, begin = item // num_shares * ROW_BLOCK, item % num_shares * share
            end_row, count = min(row + ROW_BLOCK, num_rows), min(share, outputs - begin)
            half = count if gated else count // 2
            first = args[2] + begin * row_bytes
            second = first + (outputs if gated else half) * row_bytes
            while row < end_row:
                tiles = (end_row - row + TILE_ROWS - 1) // TILE_ROWS
                rows = (end_row - row + tiles - 1) // tiles
                x = args[1] + row * inputs * 4
                _multiply(rows, x, first, second, 2 * half, inputs, row_bytes, sums.ctypes.data, share * 8, element(0))
                for r in range(rows):
                    place = ((row + r) * outputs + begin) * item_bytes
                    out, total, up = view(args[5] + place, count, element), sums[r], sums[r][half:]
                    if gated:
                        for n in range(count):
                            total[n] = _silu(total[n]) * up[n]
                    if args[3]:
                        bias = view(args[3] + begin * item_bytes, count, element)
                        for n in range(count):
                            total[n] += widened(bias[n])
                    if args[4]:
                        residual = view(args[4] + place, count, element)
                        for n in range(count):
                            total[n] += widened(residual[n])
                    for n in range(count):
                        out[n] = narrowed(total[n], out[n])
                row += rows

    return compiled(multiply)
