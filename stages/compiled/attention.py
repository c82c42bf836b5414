"""Attention of decode rows over the blocks of the KV cache, where they lie: nothing is gathered, padded or masked.

Softmax as the positions come (Milakov & Gimelshein, 2018): what was summed so far is scaled down when a larger score appears.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit

from stages.compiled import UNROLL
from stages.compiled.memory import ELEMENTS, compiled, float_of, narrowed, take, view, widened

ALL = 1 << 40  # elements of a cache, positions of a sequence: nothing asks how many there are
TILE_ELEMENTS = 1 << 13  # of keys or values, widened: 32 KiB, a core's first cache
# Not `nnan` and `ninf`: a NaN must come out as one.
FAST = {"reassoc", "contract", "nsz", "arcp"}

_F = np.float32
_LOG2_E = _F(1.4426950408889634)
_LN_2 = _F(0.693359375), _F(-2.12194440e-4)  # in two parts, the first of few bits
_SMALLEST = _F(-87.0)


@njit
def exp(x):  # type: ignore[no-untyped-def]
    """e^x of a float32 that is at most 0, within 1e-7 of itself; the polynomial of Cephes' expf. It vectorizes, libm's does not."""
    x = _SMALLEST if x < _SMALLEST else x
    whole = np.int32(x * _LOG2_E - _F(0.5))
    rest = (x - _F(whole) * _LN_2[0]) - _F(whole) * _LN_2[1]
    p = _F(1.9875691500e-4)
    p = p * rest + _F(1.3981999507e-3)
    p = p * rest + _F(8.3334519073e-3)
    p = p * rest + _F(4.1665795894e-2)
    p = p * rest + _F(1.6666665459e-1)
    p = p * rest + _F(5.0000001201e-1)
    return (p * rest * rest + rest + _F(1.0)) * float_of(np.uint32(whole + np.int32(127)) << np.uint32(23))


@njit(error_model="numpy")
def _load(cache, table, block, end_block, block_size, token_size, span, kv_PH):  # type: ignore[no-untyped-def]
    """Widen blocks of keys or values of `span` KV heads, the first where `cache` begins, to P places: heads by positions of a tile."""
    tile, head_dim = len(kv_PH) // span, kv_PH.shape[1]
    for index in range(end_block - block):
        start = table[block + index] * block_size * token_size
        for s in range(index * block_size, (index + 1) * block_size):
            for head in range(span):
                # Slices: numba takes an index that is a sum for one that may count from the end, and does not vectorize.
                vector_H, place_H = cache[start + head * head_dim :], kv_PH[head * tile + s]
                for h in range(head_dim):
                    place_H[h] = widened(vector_H[h])
            start += token_size


def decode_attention(dtype: str, head_dim: int) -> Any:
    """The function, an item of which is a row and `span` KV heads side by side.

    Its arguments after the counter: addresses of q [R, N, H] (rows `stride` elements apart), keys and values [B, S, K, H], out
    [R, N, H], int32 block tables [R, M] and int32 context lengths [R]; then R, K, N / K, M, S, `stride`, how many positions a row sees
    at most, and `span`, a divisor of K.
    """
    element = ELEMENTS[dtype]
    item_bytes = np.dtype(element).itemsize
    head_bytes = head_dim * item_bytes

    def attend(pointer):  # type: ignore[no-untyped-def]
        args = carray(pointer, 15)
        num_rows, num_kv_heads, group, table_size = args[7], args[8], args[9], args[10]
        block_size, stride_bytes, window, span = args[11], args[12] * item_bytes, args[13], args[14]
        token_size = num_kv_heads * head_dim
        keys, values = view(args[2], ALL, element), view(args[3], ALL, element)
        heads, lengths = span * group, view(args[6], num_rows, np.int32)
        scale = _F(1.0 / np.sqrt(head_dim))
        tile = max(1, TILE_ELEMENTS // (span * head_dim * block_size)) * block_size
        q_NH, out_NH = np.empty((heads, head_dim), _F), np.empty((heads, head_dim), _F)
        kv_PH = np.empty((span * tile, head_dim), _F)
        scores_S, weights_NS = np.empty(tile, _F), np.empty((heads, tile), _F)
        highest_N, total_N = np.empty(heads, _F), np.empty(heads, _F)
        while True:
            item = take(args, 1)
            if item >= num_rows * num_kv_heads // span:
                break
            row, kv_head = item * span // num_kv_heads, item * span % num_kv_heads
            table = view(args[5] + row * table_size * 4, table_size, np.int32)
            end = np.int64(lengths[row])
            first = max(0, end - window)
            for n in range(heads):
                query = view(args[1] + row * stride_bytes + (kv_head * group + n) * head_bytes, head_dim, element)
                for h in range(head_dim):
                    q_NH[n, h] = widened(query[h]) * scale
                    out_NH[n, h] = 0
                highest_N[n], total_N[n] = -np.inf, 0
            begin = first // block_size * block_size
            while begin < end:
                # Whole blocks: what lies beyond the row's positions is finite (docs/decisions/0006), and weighs nothing.
                block, end_block = begin // block_size, min(begin + tile, end + block_size - 1) // block_size
                size = (end_block - block) * block_size
                _load(keys[kv_head * head_dim :], table, block, end_block, block_size, token_size, span, kv_PH)
                for n in range(heads):
                    place = n // group * tile
                    for s in range(0, size, UNROLL):
                        k = kv_PH[place + s : place + s + UNROLL]
                        a, b, c, d = _F(0), _F(0), _F(0), _F(0)
                        for h in range(head_dim):
                            a += q_NH[n, h] * k[0, h]
                            b += q_NH[n, h] * k[1, h]
                            c += q_NH[n, h] * k[2, h]
                            d += q_NH[n, h] * k[3, h]
                        scores_S[s], scores_S[s + 1], scores_S[s + 2], scores_S[s + 3] = a, b, c, d
                    for s in range(first - begin):
                        scores_S[s] = -np.inf
                    for s in range(end - begin, size):
                        scores_S[s] = -np.inf
                    a = b = c = d = highest_N[n]
                    for s in range(0, size, UNROLL):
                        a, b = max(a, scores_S[s]), max(b, scores_S[s + 1])
                        c, d = max(c, scores_S[s + 2]), max(d, scores_S[s + 3])
                    highest = max(max(a, b), max(c, d))
                    kept, total = exp(highest_N[n] - highest), _F(0)
                    for s in range(size):
                        weight = exp(scores_S[s] - highest)
                        weights_NS[n, s] = weight
                        total += weight
                    highest_N[n], total_N[n] = highest, total_N[n] * kept + total
                    for h in range(head_dim):
                        out_NH[n, h] *= kept
                _load(values[kv_head * head_dim :], table, block, end_block, block_size, token_size, span, kv_PH)
                for n in range(heads):
                    place = n // group * tile
                    for s in range(0, size, UNROLL):
                        v = kv_PH[place + s : place + s + UNROLL]
                        a, b, c, d = weights_NS[n, s], weights_NS[n, s + 1], weights_NS[n, s + 2], weights_NS[n, s + 3]
                        for h in range(head_dim):
                            out_NH[n, h] += a * v[0, h] + b * v[1, h] + c * v[2, h] + d * v[3, h]
                begin += size
            for n in range(heads):
                out = view(args[4] + (item * heads + n) * head_bytes, head_dim, element)
                for h in range(head_dim):
                    out[h] = narrowed(out_NH[n, h] / total_N[n], out[h])

    return compiled(attend, fastmath=FAST)
