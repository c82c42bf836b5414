"""Work whose time grows with what a client sent: beside the event loop where that is long."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

LONG = 16_384
"""Characters or tokens. What is shorter takes a few milliseconds, less than most steps; a thread would cost it latency."""


async def aside(work: Callable[[], T], size: int) -> T:
    """The result of `work` on `size` characters or tokens, from a thread where they are many: streams go on meanwhile, since the
    tokenizer releases the GIL and Python gives it up every few milliseconds."""
    return await asyncio.to_thread(work) if size > LONG else work()
