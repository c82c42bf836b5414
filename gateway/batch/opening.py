"""The batch service of a gateway, as its configuration says."""

from __future__ import annotations

import asyncio

from gateway.api.service import Frontend
from gateway.batch.database import Database
from gateway.batch.run_line import LineRunner
from gateway.batch.service import BatchService
from gateway.batch.state_url import path_of
from gateway.config import BatchSection


async def open_batches(frontend: Frontend, settings: BatchSection) -> BatchService | None:
    """A running service, or None where there is no place for its state. Raises ConfigError for one that cannot be used."""
    if settings.state_url is None:
        return None
    database = await asyncio.to_thread(Database, path_of(settings.state_url))
    service = BatchService(
        database,
        LineRunner(frontend),
        max_concurrency=settings.max_concurrency,
        max_lines=settings.max_lines,
        max_file_bytes=settings.max_file_bytes,
    )
    await service.start()
    return service
