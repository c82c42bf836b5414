"""Micro-batches on their way to the pipeline: in order, each held until the masks of its rows are there."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any


class Outbox:
    """Runs `send` callbacks in the order they were put, each after its futures are done. Lives on one event loop."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[list[asyncio.Future[Any]], Callable[[], None]]] = deque()

    def __len__(self) -> int:
        """Callbacks that wait."""
        return len(self._waiting)

    def put(self, needs: Sequence[asyncio.Future[Any]], send: Callable[[], None]) -> None:
        """Send at once where nothing is missing; failed futures count as done."""
        missing = [future for future in needs if not future.done()]
        if not missing and not self._waiting:
            send()
            return
        self._waiting.append((missing, send))
        for future in missing:
            future.add_done_callback(self._flush)

    def clear(self) -> None:
        """Forget what has not been sent."""
        self._waiting.clear()

    def _flush(self, _: asyncio.Future[Any]) -> None:
        while self._waiting and all(future.done() for future in self._waiting[0][0]):
            self._waiting.popleft()[1]()
