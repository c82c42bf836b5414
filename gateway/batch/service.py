"""What the doors call for files and batches. Lives on the engine's event loop; everything it says is durable."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from dataclasses import dataclass, field
from functools import partial

from gateway.batch import files, store
from gateway.batch.connection import Connection
from gateway.batch.database import Database
from gateway.batch.lines import LineSplitter
from gateway.batch.plan import check_endpoint, check_metadata, make_plan
from gateway.batch.types import Batch, ResultKind, StoredFile
from gateway.batch.worker import Run, Worker
from stageline.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError, ResourceExhaustedError

MAX_OPEN_UPLOADS = 64
MAX_LISTED = 100
UPLOAD_IDLE_S = 3600.0


@dataclass(slots=True)
class _Upload:
    tenant: str
    splitter: LineSplitter = field(default_factory=LineSplitter)
    num_bytes: int = 0
    num_lines: int = 0
    last_bytes: int = 0  # of the last write
    touched_s: float = field(default_factory=time.monotonic)


class BatchService:
    """Files, batches, and the worker that runs them. A tenant sees its own alone."""

    def __init__(
        self, database: Database, run: Run, *, max_concurrency: int, max_lines: int, max_file_bytes: int
    ) -> None:
        self._database = database
        self._max_lines, self._max_file_bytes = max_lines, max_file_bytes
        self._worker = Worker(database, run, max_concurrency=max_concurrency)
        self._uploads: dict[str, _Upload] = {}

    async def start(self) -> None:
        """Go on with what an earlier server left."""
        await self._database.write(files.drop_incomplete)
        self._worker.start()

    def backlog_tokens(self) -> int:
        """About how many tokens wait in batches: more pipelines are started for them."""
        return self._worker.backlog_tokens

    async def stop(self) -> None:
        """End at once; nothing that was told is lost."""
        await self._worker.stop()
        self._database.close()

    async def create_file(self, tenant: str, filename: str) -> str:
        """Begin an upload; returns the file's id. Raises ResourceExhaustedError where too many are open."""
        now_s = time.monotonic()
        for file_id, upload in list(self._uploads.items()):
            if now_s - upload.touched_s > UPLOAD_IDLE_S:
                await self._abandon(file_id)
        if len(self._uploads) >= MAX_OPEN_UPLOADS:
            raise ResourceExhaustedError(
                "UPLOADS_TOO_MANY", f"{MAX_OPEN_UPLOADS} uploads are open; try again later", retry_after_s=5.0
            )
        file_id = f"file-{secrets.token_hex(12)}"
        self._uploads[file_id] = _Upload(tenant)
        await self._database.write(lambda c: files.begin(c, tenant, file_id, filename[:255], int(time.time())))
        return file_id

    async def write_file(self, tenant: str, file_id: str, offset: int, data: bytes) -> int:
        """Add bytes that follow the first `offset`; returns the length. Repeating the last write changes nothing.

        Raises NotFoundError, FailedPreconditionError for another offset, InvalidArgumentError for a line or a file that
        is too long (the upload is over then).
        """
        upload = self._upload(tenant, file_id)
        if data and offset == upload.num_bytes - upload.last_bytes and len(data) == upload.last_bytes:
            return upload.num_bytes
        if offset != upload.num_bytes:
            raise FailedPreconditionError(
                "OFFSET_WRONG", f"{file_id} has {upload.num_bytes} bytes, the write begins at {offset}; go on from there",
                field="offset_bytes", num_bytes=upload.num_bytes,
            )  # fmt: skip
        try:
            if offset + len(data) > self._max_file_bytes:
                raise InvalidArgumentError(
                    "FILE_TOO_LARGE", f"a file may have {self._max_file_bytes} bytes; cut it in pieces",
                    field="input", limit=self._max_file_bytes,
                )  # fmt: skip
            lines = upload.splitter.add(data)
            await self._append(upload, file_id, lines)
        except BaseException:  # also where the writer is cancelled: which lines are stored would be unknown
            await self._abandon(file_id)
            raise
        upload.num_bytes += len(data)
        upload.last_bytes = len(data)
        return upload.num_bytes

    async def complete_file(self, tenant: str, file_id: str) -> StoredFile:
        """End an upload. Raises NotFoundError; asking again for a file that is complete is harmless."""
        if file_id not in self._uploads:
            return await self.get_file(tenant, file_id)
        upload = self._upload(tenant, file_id)
        rest, first = upload.splitter.end(), upload.num_lines + 1
        stored = await self._database.write(
            lambda c: files.complete(c, tenant, file_id, first, rest, upload.num_bytes)
        )  # where that fails, asking again ends the whole file
        self._uploads.pop(file_id, None)
        return stored

    async def get_file(self, tenant: str, file_id: str) -> StoredFile:
        """Raises NotFoundError."""
        return await self._database.read(lambda c: files.get(c, tenant, file_id))

    async def list_files(self, tenant: str) -> list[StoredFile]:
        """Input files, the newest first."""
        return await self._database.read(lambda c: files.input_files(c, tenant))

    async def delete_file(self, tenant: str, file_id: str) -> None:
        """Raises NotFoundError, FailedPreconditionError for the input of a batch that runs."""
        await self._database.write(lambda c: files.delete(c, tenant, file_id))

    async def read_file(self, tenant: str, file_id: str) -> AsyncIterator[bytes]:
        """The file's bytes, a page at a time. Raises NotFoundError."""
        after = 0
        while page := await self._database.read(partial(files.page, tenant=tenant, file_id=file_id, after_line=after)):
            yield b"".join(data for _, data in page)
            after = page[-1][0]

    async def create_batch(
        self, tenant: str, input_file_id: str, *, endpoint: str = "", window_s: int | None = None,
        metadata: dict[str, str] | None = None, key: str | None = None,
    ) -> Batch:  # fmt: skip
        """A new batch, or the one with this idempotency key. Raises InvalidArgumentError for an input that cannot be run as
        a whole, NotFoundError."""
        if endpoint:
            check_endpoint(endpoint)
        if window_s is not None and window_s < 1:
            raise InvalidArgumentError("WINDOW_INVALID", f"window_s must be over 0, got {window_s}", field="window_s")
        if key is not None and len(key) > 128:
            raise InvalidArgumentError(
                "IDEMPOTENCY_KEY_TOO_LONG", "an idempotency key has 128 characters at most", field="idempotency_key"
            )
        known = check_metadata(dict(metadata or {}))
        batch_id = f"batch_{secrets.token_hex(12)}"
        plan = await self._database.read(
            lambda c: make_plan(batch_id, _lines(c, tenant, input_file_id), endpoint, self._max_lines)
        )
        batch = await self._database.write(
            lambda c: store.create(
                c,
                batch_id,
                plan,
                tenant=tenant,
                key=key,
                input_file_id=input_file_id,
                only_endpoint=endpoint,
                window_s=window_s,
                metadata=known,
                now_s=int(time.time()),
            )
        )
        self._worker.notify()
        return batch

    async def get_batch(self, tenant: str, batch_id: str) -> Batch:
        """Raises NotFoundError."""
        return await self._database.read(lambda c: store.find(c, tenant, batch_id))

    async def find_batch(self, tenant: str, key: str) -> Batch:
        """By idempotency key. Raises NotFoundError."""
        batch = await self._database.read(lambda c: store.find_key(c, tenant, key))
        if batch is None:
            raise NotFoundError(
                "BATCH_NOT_FOUND", "there is no batch with this idempotency key", field="idempotency_key"
            )
        return batch

    async def list_batches(self, tenant: str, after: str, limit: int) -> tuple[list[Batch], bool]:
        """Newest first; and whether there are more. Raises NotFoundError for an unknown `after`, InvalidArgumentError."""
        if not 1 <= limit <= MAX_LISTED:
            raise InvalidArgumentError(
                "LIMIT_OUT_OF_RANGE", f"limit must be from 1 to {MAX_LISTED}, got {limit}", field="limit", value=limit
            )
        return await self._database.read(lambda c: store.listed(c, tenant, after, limit))

    async def cancel_batch(self, tenant: str, batch_id: str) -> Batch:
        """Raises NotFoundError, FailedPreconditionError for a batch that has ended."""
        batch = await self._database.write(lambda c: store.cancel(c, tenant, batch_id, int(time.time())))
        self._worker.notify()
        return batch

    async def delete_batch(self, tenant: str, batch_id: str) -> None:
        """Raises NotFoundError, FailedPreconditionError for a batch that runs."""
        await self._database.write(lambda c: store.delete(c, tenant, batch_id))

    async def results(
        self, tenant: str, batch_id: str, kind: ResultKind, after_line: int
    ) -> AsyncGenerator[tuple[bytes, int], None]:
        """(whole lines, the last one's number) of what is there now. Raises NotFoundError."""
        await self.get_batch(tenant, batch_id)
        while page := await self._database.read(
            partial(files.results_page, batch_id=batch_id, kind=kind, after_line=after_line)
        ):
            after_line = page[-1][0]
            yield b"".join(data for _, data in page), after_line

    def _upload(self, tenant: str, file_id: str) -> _Upload:
        upload = self._uploads.get(file_id)
        if upload is None or upload.tenant != tenant:
            raise NotFoundError(
                "UPLOAD_NOT_FOUND", f"no upload of {file_id[:128]!r} is open here; begin again with CreateFile",
                field="file_id", id=file_id[:128],
            )  # fmt: skip
        upload.touched_s = time.monotonic()
        return upload

    async def _append(self, upload: _Upload, file_id: str, lines: list[bytes]) -> None:
        if lines:
            first = upload.num_lines + 1
            await self._database.write(lambda c: files.append(c, file_id, first, lines))
            upload.num_lines += len(lines)

    async def _abandon(self, file_id: str) -> None:
        self._uploads.pop(file_id, None)
        await self._database.write(lambda c: files.drop(c, file_id))


def _lines(connection: Connection, tenant: str, file_id: str) -> Iterator[tuple[int, bytes]]:
    after = 0
    while page := files.page(connection, tenant, file_id, after):
        yield from page
        after = page[-1][0]
