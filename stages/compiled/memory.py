"""What numba lacks for loops over memory that is torch's, shared by threads that are torch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

_BITS = ir.IntType(32)
ARGUMENTS = types.void(types.CPointer(types.int64))
"""Of every compiled function: an address of int64 numbers, which are addresses and sizes. The first counts the items taken."""


def compiled(function: Callable[[Any], None], **options: Any) -> Any:
    """A function of ARGUMENTS, with its `address`. What is compiled is kept beside its file or in the user's cache folder, else
    compiled by every process. numba compiles it anew when that file changes, not when one changes that it imports: then clear
    `stages/compiled/__pycache__`."""
    try:
        return cfunc(ARGUMENTS, error_model="numpy", cache=True, **options)(function)
    except RuntimeError:  # numba finds no folder that it may write to
        return cfunc(ARGUMENTS, error_model="numpy", **options)(function)


@intrinsic  # type: ignore[untyped-decorator]
def _pointer(typing_context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


@intrinsic  # type: ignore[untyped-decorator]
def take(typing_context: Any, counter: Any, amount: Any) -> Any:
    """Add `amount` to the first element of an int64 array, atomically; returns what was there.

    So threads share out items among themselves, whichever of them come, and long items do not wait for one another.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, args[0])
        return builder.atomic_rmw("add", array.data, args[1], "monotonic")

    return types.int64(counter, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def float_of(typing_context: Any, bits: Any) -> Any:
    """The float32 with these bits (uint32)."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), generate


@njit(inline="always")
def view(address, length, dtype):  # type: ignore[no-untyped-def]
    """`length` elements at an address, as an array."""
    return carray(_pointer(address), length, dtype=dtype)


ELEMENTS = {"float32": np.float32, "bfloat16": np.uint16}
"""What a tensor's elements are to numba. It knows no bfloat16: to it one is the upper half of a float32."""


@intrinsic  # type: ignore[untyped-decorator]
def widened(typing_context: Any, element: Any) -> Any:
    """An element as float32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if element == types.float32:
            return args[0]
        return builder.bitcast(builder.shl(builder.zext(args[0], _BITS), _BITS(16)), ir.FloatType())

    return types.float32(element), generate


@intrinsic  # type: ignore[untyped-decorator]
def narrowed(typing_context: Any, value: Any, like: Any) -> Any:
    """A float32 as an element like another; bfloat16: the nearest, ties to even."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if like == types.float32:
            return args[0]
        bits = builder.bitcast(args[0], _BITS)
        odd = builder.and_(builder.lshr(bits, _BITS(16)), _BITS(1))
        return builder.trunc(
            builder.lshr(builder.add(builder.add(bits, _BITS(0x7FFF)), odd), _BITS(16)), ir.IntType(16)
        )

    return like(types.float32, like), generate
