"""Work whose time grows with what a client sent: beside the event loop where that is long."""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import Callable
from functools import cache
from typing import TypeVar

T = TypeVar("T")

LONG = 16_384
"""Characters or tokens. What is shorter takes a few milliseconds, less than most steps; a thread would cost it latency."""


VERY_LONG = 262_144
"""Characters or tokens. glibc keeps what such work leaves in the arena of each thread, tens of MiB a thread, for later use."""


async def aside(work: Callable[[], T], size: int) -> T:
    """The result of `work` on `size` characters or tokens, from a thread where they are many: streams go on meanwhile, since the
    tokenizer releases the GIL and Python gives it up every few milliseconds."""
    if size <= LONG:
        return work()
    return await asyncio.to_thread(work if size <= VERY_LONG else lambda: _frugal(work))


def _frugal(work: Callable[[], T]) -> T:
    try:
        return work()
    finally:
        if (trim := _malloc_trim()) is not None:
            trim(0)  # a few milliseconds, without the GIL


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    """glibc's; other C libraries have none."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
