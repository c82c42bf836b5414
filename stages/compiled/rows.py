"""What is done to each token alone between the products of a layer: norms, rotation with the way into the KV cache, widening."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from stages.compiled.memory import ELEMENTS, compiled, narrowed, take, view, widened

_F = np.float32


def rms_norm(dtype: str) -> Any:
    """The function, an item of which is a token: see layers.ops.RMSNorm, whose roundings it has.

    Its arguments after the counter: addresses of x and out [T, D], the weight [D], and a float32 [1] with epsilon; then T, D and how many
    tokens a thread takes at once.
    """
    element = ELEMENTS[dtype]
    item_bytes = np.dtype(element).itemsize

    def norm(pointer):  # type: ignore[no-untyped-def]
        args = carray(pointer, 8)
        num_tokens, size, at_once = args[5], args[6], args[7]
        weight, epsilon = view(args[3], size, element), view(args[4], 1, _F)[0]
        while True:
            begin = take(args, at_once)
            if begin >= num_tokens:
                break
            for token in range(begin, min(begin + at_once, num_tokens)):
                # A view for each row: numba takes an index that is a sum for one that may count from the end, and does not vectorize.
                start = token * size * item_bytes
                x, out = view(args[1] + start, size, element), view(args[2] + start, size, element)
                squares = _F(0)
                for d in range(size):
                    squares += widened(x[d]) * widened(x[d])
                scale = _F(1) / np.sqrt(squares / _F(size) + epsilon)
                for d in range(size):
                    scaled = widened(narrowed(widened(x[d]) * scale, x[d]))
                    out[d] = narrowed(scaled * widened(weight[d]), x[d])

    # So that the sum of squares vectorizes; in bfloat16 nothing else can change places, roundings stand between.
    return compiled(norm, fastmath={"reassoc"})


def rotate_and_store(dtype: str, head_dim: int) -> Any:
    """The function, an item of which is a token: its queries and keys are rotated in place, as layers.ops.rotate_ does it bit for bit,
    and its keys and values written to their slot.

    Its arguments after the counter: addresses of heads [T, N + 2K, H], cos and signed sin [T, H], int64 slots [T], and keys and values
    [B · S, K, H]; then T, N, K and how many tokens a thread takes at once.
    """
    element = ELEMENTS[dtype]
    half = head_dim // 2
    item_bytes = np.dtype(element).itemsize

    def rotate(pointer):  # type: ignore[no-untyped-def]
        args = carray(pointer, 11)
        num_tokens, num_heads, num_kv_heads, at_once = args[7], args[8], args[9], args[10]
        slots = view(args[4], num_tokens, np.int64)
        kv_size = num_kv_heads * head_dim
        half_bytes, head_bytes, kv_bytes = half * item_bytes, head_dim * item_bytes, kv_size * item_bytes
        while True:
            begin = take(args, at_once)
            if begin >= num_tokens:
                break
            for token in range(begin, min(begin + at_once, num_tokens)):
                angle = token * head_bytes
                cos_low, sin_low = view(args[2] + angle, half, element), view(args[3] + angle, half, element)
                angle += half_bytes
                cos_high, sin_high = view(args[2] + angle, half, element), view(args[3] + angle, half, element)
                head = args[1] + token * (num_heads + 2 * num_kv_heads) * head_bytes
                for _ in range(num_heads + num_kv_heads):
                    low, high = view(head, half, element), view(head + half_bytes, half, element)
                    for h in range(half):
                        a, b = widened(low[h]), widened(high[h])
                        a_cos = narrowed(a * widened(cos_low[h]), low[h])
                        b_sin = narrowed(b * widened(sin_low[h]), low[h])
                        b_cos = narrowed(b * widened(cos_high[h]), low[h])
                        a_sin = narrowed(a * widened(sin_high[h]), low[h])
                        low[h] = narrowed(widened(a_cos) + widened(b_sin), low[h])
                        high[h] = narrowed(widened(b_cos) + widened(a_sin), high[h])
                    head += head_bytes
                source = view(head - num_kv_heads * head_bytes, 2 * kv_size, element)
                keys = view(args[5] + slots[token] * kv_bytes, kv_size, element)
                values = view(args[6] + slots[token] * kv_bytes, kv_size, element)
                keys[:] = source[:kv_size]
                values[:] = source[kv_size:]

    return compiled(rotate)


def widen(dtype: str) -> Any:
    """The function, an item of which is an element: as float32.

    Its arguments after the counter: addresses of x and of out, elements, and how many of them a thread takes at once.
    """
    element = ELEMENTS[dtype]
    item_bytes = np.dtype(element).itemsize

    def copy(pointer):  # type: ignore[no-untyped-def]
        args = carray(pointer, 5)
        while True:
            begin = take(args, args[4])
            count = min(args[3] - begin, args[4])
            if count <= 0:
                break
            x, out = view(args[1] + begin * item_bytes, count, element), view(args[2] + begin * 4, count, _F)
            for index in range(count):
                out[index] = widened(x[index])

    return compiled(copy)
