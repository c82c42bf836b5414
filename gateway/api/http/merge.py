"""Several streams as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TypeVar

T = TypeVar("T")

# Items of one stream that may wait for a slow client before the stream is held up.
DEPTH = 64


async def merged(streams: Sequence[AsyncGenerator[T]]) -> AsyncGenerator[tuple[int, T]]:
    """(place of the stream, item) as they come. The first error of one ends all; closing it closes all."""
    if len(streams) == 1:  # no task, no queue: the usual case is the fast one
        async with aclosing(streams[0]) as only:
            async for item in only:
                yield 0, item
        return
    items: asyncio.Queue[tuple[int, T] | Exception | None] = asyncio.Queue(DEPTH)

    async def run(place: int, stream: AsyncGenerator[T]) -> None:
        try:
            async with aclosing(stream):
                async for item in stream:
                    await items.put((place, item))
        except Exception as error:
            await items.put(error)
        else:
            await items.put(None)

    tasks = [asyncio.create_task(run(place, stream)) for place, stream in enumerate(streams)]
    try:
        open_streams = len(tasks)
        while open_streams:
            received = await items.get()
            if isinstance(received, Exception):
                raise received
            if received is None:
                open_streams -= 1
            else:
                yield received
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
