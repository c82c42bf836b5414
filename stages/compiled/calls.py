"""Many calls of compiled functions with one, out of a table of their numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from stages.compiled.memory import compiled, view

CALL_NUMBERS = 17
"""Of a call in the table: address, threads, counter, and as many arguments as attention has, which has most."""


def _function(builder: Any, address: Any, num_arguments: int) -> Any:
    """The C function at an address: void, of int64 numbers or pointers."""
    kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * num_arguments)
    return builder.inttoptr(address, kind.as_pointer())


@intrinsic  # type: ignore[untyped-decorator]
def _call(typing_context: Any, parallel: Any, function: Any, argument: Any, threads: Any) -> Any:
    """Call the compiled function at an address with the address of its arguments, on one thread or, by GOMP_parallel, on several."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        gomp, entry, pointer, number = args
        alone = builder.icmp_signed("==", number, number.type(1))
        with builder.if_else(alone) as (then, otherwise):
            with then:
                builder.call(_function(builder, entry, 1), (pointer,))
            with otherwise:
                builder.call(_function(builder, gomp, 4), (entry, pointer, number, number.type(0)))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


def all_calls() -> Any:
    """The function. Its arguments after a place that it does not use: addresses of GOMP_parallel and of the table, and calls in it."""

    def run(pointer):  # type: ignore[no-untyped-def]
        args = carray(pointer, 4)
        place = args[2]
        for _ in range(args[3]):
            numbers = view(place, 3, np.int64)
            numbers[2] = 0
            _call(args[1], numbers[0], place + 16, numbers[1])
            place += CALL_NUMBERS * 8

    return compiled(run)
