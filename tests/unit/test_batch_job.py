"""Uploads that end twice, and inputs that changed, whatever came since."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gateway.batch import files
from gateway.batch.database import Database
from gateway.batch.service import BatchService
from gateway.batch.sqlite import SqliteState
from gateway.batch.types import Batch
from gateway.cli.batch_job import Job, run_job
from stageline.errors import ConfigError, ResourceExhaustedError


class ManyBatches:
    """A server's list, the newest first; the oldest is of the job and still runs."""

    def __init__(self, job: Job) -> None:
        def batch(number: int, **what: Any) -> Batch:
            common: dict[str, Any] = {"input_file_id": "f", "endpoint": "/v1/completions", "total": 1, "created_s": 1}
            return Batch(id=f"batch_{number}", **common, **what)

        others = [batch(number, status="completed") for number in range(250)]
        self.batches = [*others, batch(250, status="in_progress", metadata={"job": job.place})]

    def find(self, key: str) -> None:
        """The input is new."""

    def list(self, limit: int, after: str = "") -> tuple[list[Batch], bool]:
        ids = [batch.id for batch in self.batches]
        start = ids.index(after) + 1 if after else 0
        return self.batches[start : start + limit], start + limit < len(ids)


def test_a_changed_input_is_noticed_however_many_batches_came_since(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("changed\n")
    job = Job(tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "errors.jsonl")
    with pytest.raises(ConfigError, match="changed since batch_250 began") as error:
        run_job(ManyBatches(job), job, wait=False, note=None)  # type: ignore[arg-type]
    assert error.value.reason == "INPUT_CHANGED"


async def test_an_upload_whose_end_failed_once_keeps_its_last_line(tmp_path: Path, monkeypatch) -> None:
    complete, failures = files.complete, [ResourceExhaustedError("STATE_DISK_FULL", "full")]

    def once_full(*arguments: Any) -> Any:
        stored = complete(*arguments)
        if failures:
            raise failures.pop()
        return stored

    monkeypatch.setattr(files, "complete", once_full)
    service = BatchService(
        Database(SqliteState(tmp_path / "state.db")), lambda *_: None, max_concurrency=1, max_lines=9, max_file_bytes=99
    )  # type: ignore[arg-type]
    await service.start()
    file_id = await service.create_file("", "in.jsonl")
    await service.write_file("", file_id, 0, b"first\nlast")
    with pytest.raises(ResourceExhaustedError):
        await service.complete_file("", file_id)
    assert (await service.complete_file("", file_id)).num_bytes == 10
    assert b"".join([page async for page in service.read_file("", file_id)]) == b"first\nlast"
    await service.stop()
