"""The batch service from outside: calls that survive a server's restart, and a job that goes on where it was."""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc

from gateway.batch.messages import from_message
from gateway.batch.types import FINAL, Batch
from gateway.cli.connection import Connection
from gateway.cli.servers import failure
from stageline.batch.v1 import batch_service_pb2 as pb
from stageline.batch.v1 import batch_service_pb2_grpc as pb_grpc
from stageline.client.backoff import Backoff
from stageline.errors import ConfigError, FailedPreconditionError, NotFoundError, StagelineError

T = TypeVar("T")
CHUNK_BYTES = 1 << 20
POLL_S = 0.5
MAX_UPLOADS = 10  # of one file, before the server is taken to be unable to keep it
GIVE_UP_S = 600.0  # without any answer of the server
FIRST_ANSWER_S = 5.0  # for the first: the address may be wrong
CALL_TIMEOUT_S = 60.0
BACKOFF = Backoff(initial_s=0.2, max_s=5.0)

Note = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Job:
    """A file to run and where the results go."""

    input: Path
    output: Path
    errors: Path
    window_s: int = 0

    @property
    def place(self) -> str:
        """Names the job whatever its input holds: the files it reads and writes."""
        paths = "\0".join(str(path.absolute()) for path in (self.input, self.output, self.errors))
        return hashlib.sha256(paths.encode("utf-8", "surrogateescape")).hexdigest()[:32]


class BatchClient:
    """Calls with retries while the server is away, for `GIVE_UP_S`."""

    def __init__(self, connection: Connection, *, give_up_s: float = GIVE_UP_S) -> None:
        self._connection, self._give_up_s = connection, give_up_s
        self._channel = connection.channel()
        self._stub = pb_grpc.BatchServiceStub(self._channel)
        self._reached = False

    def __enter__(self) -> BatchClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self._channel.close()

    def get(self, batch_id: str) -> Batch:
        """Raises NotFoundError."""
        return from_message(self._call(self._stub.GetBatch, pb.GetBatchRequest(batch_id=batch_id)).batch)

    def find(self, key: str) -> Batch | None:
        """By idempotency key."""
        try:
            return from_message(self._call(self._stub.GetBatch, pb.GetBatchRequest(idempotency_key=key)).batch)
        except NotFoundError:
            return None

    def list(self, limit: int, after: str = "") -> tuple[list[Batch], bool]:
        """Newest first, those older than batch `after` where one is named; and whether there are more."""
        page = self._call(self._stub.ListBatches, pb.ListBatchesRequest(limit=limit, after_batch_id=after))
        return [from_message(batch) for batch in page.batches], page.has_more

    def cancel(self, batch_id: str) -> Batch:
        """Raises NotFoundError, FailedPreconditionError."""
        return from_message(self._call(self._stub.CancelBatch, pb.CancelBatchRequest(batch_id=batch_id)).batch)

    def delete(self, batch_id: str) -> None:
        """Raises NotFoundError, FailedPreconditionError."""
        self._call(self._stub.DeleteBatch, pb.DeleteBatchRequest(batch_id=batch_id))

    def create(self, file_id: str, key: str, window_s: int, metadata: dict[str, str]) -> Batch:
        """Raises what `BatchService.create_batch` raises."""
        request = pb.CreateBatchRequest(
            input_file_id=file_id, window_s=window_s, metadata=metadata, idempotency_key=key
        )
        return from_message(self._call(self._stub.CreateBatch, request).batch)

    def upload(self, path: Path, note: Note) -> tuple[str, str]:
        """Send a file; returns its id and the SHA-256 of what was sent. Begins again where the server forgot it meanwhile."""
        for attempt in itertools.count(1):
            try:
                return self._upload(path, note)
            except (NotFoundError, FailedPreconditionError) as error:
                # The server was replaced in the middle.
                if error.reason not in ("UPLOAD_NOT_FOUND", "FILE_NOT_FOUND", "OFFSET_WRONG") or attempt == MAX_UPLOADS:
                    raise
                time.sleep(POLL_S)
        raise AssertionError("the loop returns or raises")

    def _upload(self, path: Path, note: Note) -> tuple[str, str]:
        digest, offset, size = hashlib.sha256(), 0, path.stat().st_size
        file_id = self._call(self._stub.CreateFile, pb.CreateFileRequest(filename=path.name)).file_id
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
                self._call(self._stub.WriteFile, pb.WriteFileRequest(file_id=file_id, offset_bytes=offset, data=chunk))
                offset += len(chunk)
                note(f"sent {offset / max(1, size):.0%} of {path.name}")
        self._call(self._stub.CompleteFile, pb.CompleteFileRequest(file_id=file_id))
        return file_id, digest.hexdigest()

    def download(self, batch_id: str, kind: pb.ResultKind.ValueType, path: Path) -> None:
        """Write the results of one kind; the file is replaced in one piece, when all is there. Goes on where a server's end
        cut the stream off. Raises ConfigError where it cannot be written."""
        temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            with temporary.open("wb") as file:
                last_line = 0

                def read() -> None:
                    nonlocal last_line
                    request = pb.ReadResultsRequest(batch_id=batch_id, kind=kind, after_line=last_line)
                    for page in self._stub.ReadResults(request, metadata=self._connection.metadata):
                        file.write(page.data)
                        last_line = page.last_line

                self._retried(read)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise ConfigError(
                "OUTPUT_NOT_WRITABLE",
                f"cannot write {path}: {error.strerror}; the results stay on the server, run the command again",
                field="--output-file", path=path,
            ) from None  # fmt: skip

    def _call(self, method: Callable[..., T], request: Any) -> T:
        return self._retried(lambda: method(request, timeout=CALL_TIMEOUT_S, metadata=self._connection.metadata))

    def _retried(self, action: Callable[[], T]) -> T:
        """An error that a retry can cure is only seen after `give_up_s`, at the first call after FIRST_ANSWER_S."""
        began_s, failures = time.monotonic(), 0
        while True:
            try:
                result = action()
                self._reached = True
                return result
            except grpc.RpcError as error:
                typed = failure(error, self._connection.address)
                if error.code() == grpc.StatusCode.UNIMPLEMENTED:
                    typed = FailedPreconditionError(
                        "BATCHES_OFF", f"the server at {self._connection.address} keeps no batches; "
                        "start it with --batch.state-url sqlite:///PATH or postgresql://…",
                    )  # fmt: skip
                cured = error.code() in (
                    grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.DEADLINE_EXCEEDED,
                )  # fmt: skip
                give_up_s = self._give_up_s if self._reached else min(FIRST_ANSWER_S, self._give_up_s)
                if not cured or time.monotonic() - began_s > give_up_s:
                    raise typed from None
                delay_s = BACKOFF.delay_s(
                    failures, random.random(), retry_after_s=float(typed.metadata.get("retry_after_s", 0.0))
                )
                assert delay_s is not None
                time.sleep(delay_s)
                failures += 1


def run_job(client: BatchClient, job: Job, *, wait: bool, note: Note | None) -> Batch:
    """Send the job, or find what was sent before, and where it has ended (`wait`: until then) write its results.

    Raises ConfigError for files that cannot be used and for an input that changed since a batch of it began.
    """
    say: Note = note or (lambda text: None)
    fingerprint = _fingerprint(job.input)
    for path in {job.output, job.errors}:
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise ConfigError("OUTPUT_NOT_WRITABLE", f"{path} cannot be written: no such folder", field="--output-file")
    if len({path.absolute() for path in (job.input, job.output, job.errors)}) < 3:
        raise ConfigError("OUTPUT_IS_INPUT", "input, --output-file and --error-file must be three files")
    batch = client.find(key := f"{job.place}-{fingerprint}")
    if batch is None:
        _refuse_changed(client, job)
        file_id, sent = client.upload(job.input, say)
        if sent != fingerprint:
            raise _changed(job, "while it was sent")
        batch = client.create(file_id, key, job.window_s, {"job": job.place, "input_sha256": fingerprint})
    began_s, began_done = time.monotonic(), batch.completed + batch.failed
    while wait and batch.status not in FINAL:
        say(describe(batch) + _estimate(batch, began_done, time.monotonic() - began_s))
        time.sleep(POLL_S)
        batch = client.get(batch.id)
    if batch.status in FINAL:
        client.download(batch.id, pb.RESULT_KIND_OUTPUT, job.output)
        client.download(batch.id, pb.RESULT_KIND_ERROR, job.errors)
        say(f"{batch.completed} answers in {job.output}, {batch.failed} errors in {job.errors}\n")
    return batch


def describe(batch: Batch) -> str:
    """One line for people."""
    return f"{batch.id}  {batch.status}  {batch.completed} of {batch.total} completed, {batch.failed} failed"


def _estimate(batch: Batch, began_done: int, seconds: float) -> str:
    done = batch.completed + batch.failed
    if done == began_done or seconds < 1:
        return ""
    left_s = (batch.total - done) * seconds / (done - began_done)
    return f", about {left_s:.0f} s left"


def _fingerprint(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise ConfigError("INPUT_UNREADABLE", f"cannot read {path}: {error.strerror}", field="input") from None
    return digest.hexdigest()


def _refuse_changed(client: BatchClient, job: Job) -> None:
    """A batch of these very files that still runs began with another input."""
    after, more = "", True
    while more:
        found, more = client.list(100, after)
        for batch in found:
            after = batch.id
            if batch.metadata.get("job") == job.place and batch.status not in FINAL:
                raise _changed(
                    job, f"since {batch.id} began, which still runs; cancel that batch, or name another --output-file"
                )


def _changed(job: Job, when: str) -> StagelineError:
    return ConfigError("INPUT_CHANGED", f"{job.input} changed {when}", field="input")
