"""Where work on what clients send runs."""

from __future__ import annotations

import threading

from gateway.api.aside import LONG, aside


async def test_long_work_leaves_the_event_loop_and_short_work_stays() -> None:
    loop = threading.get_ident()
    assert await aside(threading.get_ident, LONG) == loop
    assert await aside(threading.get_ident, LONG + 1) != loop
