"""What waits in batches is demand, as tokens."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from gateway.batch.database import Database
from gateway.batch.service import BatchService
from gateway.batch.sqlite import SqliteState
from gateway.batch.worker import ASSUMED_LINE_TOKENS


def line(number: int) -> str:
    body = {"model": "m", "prompt": [1], "max_tokens": 4}
    return json.dumps({"custom_id": f"r-{number}", "method": "POST", "url": "/v1/completions", "body": body})


async def test_lines_that_wait_count_as_long_as_those_that_ended(tmp_path: Path) -> None:
    free: asyncio.Queue[int] = asyncio.Queue()

    async def answer(*_: object) -> dict[str, Any]:
        return {"usage": {"prompt_tokens": await free.get(), "completion_tokens": 0}}

    service = BatchService(
        Database(SqliteState(tmp_path / "state.db")), answer, max_concurrency=2, max_lines=100, max_file_bytes=1 << 20
    )
    await service.start()

    async def until(tokens: int) -> None:
        async with asyncio.timeout(10):
            while service.backlog_tokens() != tokens:  # noqa: ASYNC110  # polled as the engine polls it
                await asyncio.sleep(0.01)

    try:
        assert service.backlog_tokens() == 0
        file_id = await service.create_file("", "input.jsonl")
        await service.write_file("", file_id, 0, "\n".join(map(line, range(10))).encode() + b"\n")
        await service.complete_file("", file_id)
        await service.create_batch("", file_id)
        await until(8 * ASSUMED_LINE_TOKENS)  # two of ten run
        free.put_nowait(100)
        free.put_nowait(300)
        await until(6 * 200)
        for _ in range(8):
            free.put_nowait(200)
        await until(0)
    finally:
        await service.stop()
