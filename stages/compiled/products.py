"""Products with weights as the checkpoint has them, float32, or bfloat16 on a CPU without instructions for it; or quantized.

A tile of rows and weight rows is multiplied in registers: each weight is read and widened once for up to six rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit

from stages.compiled.attention import exp
from stages.compiled.memory import ELEMENTS, compiled, narrowed, take, view, widened
from stages.compiled.tiles import GROUP, int4_tile, tile

STREAMS = 8
"""Weight rows that one row is multiplied with at once; a product has a multiple of them as outputs."""
TILE_ROWS, INT4_TILE_ROWS = 6, 4
ROW_BLOCK = 16 * TILE_ROWS
"""Rows that an item has at most: a block of them stays in the cache that cores share while the weights pass by."""
WEIGHTS = {**ELEMENTS, "int8": np.int8, "int4": np.uint8}
"""What a weight's elements are to numba; of int4 a byte has two."""

_F = np.float32
_GROUP = np.int64(GROUP)

# As many sums as AVX2 has registers for, less those for rows and weights; one row alone waits for memory, which likes many streams.
_1x8, _2x4, _3x4, _4x2, _5x2, _6x2 = (tile(rows, s) for rows, s in ((1, 8), (2, 4), (3, 4), (4, 2), (5, 2), (6, 2)))
_int4_1x2, _int4_2x2, _int4_3x2, _int4_4x2 = (int4_tile(rows, 2) for rows in range(1, INT4_TILE_ROWS + 1))


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


@njit(error_model="numpy")
def _multiply_int4(rows, x, first, second, first_scales, second_scales, width, size, sums, pitch):  # type: ignore[no-untyped-def]
    """The same with int4 weights."""
    row_bytes, scale_bytes = size // 2, size // _GROUP * 8
    length = width // 2
    stride, scale_stride, step = length * row_bytes, length * scale_bytes, length * 4
    for s in range(length):
        place, a, b = sums + s * 4, first + s * row_bytes, second + s * row_bytes
        c, d = first_scales + s * scale_bytes, second_scales + s * scale_bytes
        if rows == 1:
            _int4_1x2(x, a, b, stride, c, d, scale_stride, size, place, pitch, step)
        elif rows == 2:
            _int4_2x2(x, a, b, stride, c, d, scale_stride, size, place, pitch, step)
        elif rows == 3:
            _int4_3x2(x, a, b, stride, c, d, scale_stride, size, place, pitch, step)
        else:
            _int4_4x2(x, a, b, stride, c, d, scale_stride, size, place, pitch, step)


@njit
def _silu(x):  # type: ignore[no-untyped-def]
    power = exp(-abs(x))
    sigmoid = _F(1) / (_F(1) + power)
    return x * (sigmoid if x >= 0 else power * sigmoid)


def product(dtype: str, weights: str) -> Any:
    """The function, an item of which is a block of rows and a share of the outputs.

    Its arguments after the counter: addresses of float32 x [T, I], the weight [O, I], float32 scales or 0 ([O] of int8; of int4 a scale
    and an offset of each group [O, I / GROUP, 2]), bias [O] or 0, residual [T, O] or 0, and out [T, O]; then T, I, O, outputs of a
    share, and whether it is gated: the weight is then [2 O, I], and out silu(x @ gate.T) * (x @ up.T), without bias and residual.
    Rounded once.
    """
    element, weight_element = ELEMENTS[dtype], WEIGHTS[weights]
    item_bytes, weight_bytes = np.dtype(element).itemsize, np.dtype(weight_element).itemsize
    is_int8, is_int4 = weights == "int8", weights == "int4"
    tile_rows = INT4_TILE_ROWS if is_int4 else TILE_ROWS

    def multiply(pointer):  # type: ignore[no-untyped-def]
        args = carray(pointer, 12)
        num_rows, inputs, outputs, share, gated = args[7], args[8], args[9], args[10], args[11]
        row_bytes = inputs // 2 if is_int4 else inputs * weight_bytes
        scale_bytes = inputs // _GROUP * 8 if is_int4 else 4
        num_shares = (outputs + share - 1) // share
        num_items = (num_rows + ROW_BLOCK - 1) // ROW_BLOCK * num_shares
        sums = np.empty((TILE_ROWS, share * 2), _F)
        pitch = share * 8
        while True:
            item = take(args, 1)
            if item >= num_items:
                break
            row, begin = item // num_shares * ROW_BLOCK, item % num_shares * share
            end_row, count = min(row + ROW_BLOCK, num_rows), min(share, outputs - begin)
            half = count if gated else count // 2
            to_second = outputs if gated else half
            first, first_scales = args[2] + begin * row_bytes, args[3] + begin * scale_bytes
            second, second_scales = first + to_second * row_bytes, first_scales + to_second * scale_bytes
            while row < end_row:
                tiles = (end_row - row + tile_rows - 1) // tile_rows
                rows = (end_row - row + tiles - 1) // tiles
                x, place = args[1] + row * inputs * 4, sums.ctypes.data
                if is_int4:
                    _multiply_int4(
                        rows, x, first, second, first_scales, second_scales, 2 * half, inputs, place, pitch
                    )  # fmt: skip
                else:
                    _multiply(rows, x, first, second, 2 * half, inputs, row_bytes, place, pitch, weight_element(0))
                for r in range(rows):
                    place = ((row + r) * outputs + begin) * item_bytes
                    out, total, up = view(args[6] + place, count, element), sums[r], sums[r][half:]
                    if is_int8:
                        scales, up_scales = view(first_scales, count, _F), view(second_scales, half, _F)
                        for n in range(count):
                            total[n] *= scales[n]
                        if gated:
                            for n in range(count):
                                up[n] *= up_scales[n]
                    if gated:
                        for n in range(count):
                            total[n] = _silu(total[n]) * up[n]
                    if args[4]:
                        bias = view(args[4] + begin * item_bytes, count, element)
                        for n in range(count):
                            total[n] += widened(bias[n])
                    if args[5]:
                        residual = view(args[5] + place, count, element)
                        for n in range(count):
                            total[n] += widened(residual[n])
                    for n in range(count):
                        out[n] = narrowed(total[n], out[n])
                row += rows

    return compiled(multiply)
