"""Where work on what clients send runs."""

from __future__ import annotations

import threading

import psutil

from gateway.api.aside import LONG, VERY_LONG, aside


async def test_long_work_leaves_the_event_loop_and_short_work_stays() -> None:
    loop = threading.get_ident()
    assert await aside(threading.get_ident, LONG) == loop
    assert await aside(threading.get_ident, LONG + 1) != loop


async def test_memory_of_very_long_work_goes_back() -> None:
    def hoard() -> int:
        pieces = [b"x" * (65_536 + i % 2) for i in range(3_000)]  # below the size that malloc maps by itself
        keep.extend(pieces[::100])  # between them: no arena can shrink from its end alone
        return len(pieces)

    keep: list[bytes] = []
    memory = psutil.Process().memory_info
    before = memory().rss
    assert await aside(hoard, VERY_LONG + 1) == 3_000
    assert memory().rss - before < 2**25
