"""The batch state when nothing more can be written, and afterwards."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import asyncio, resource, sys
from pathlib import Path
from gateway.batch.database import Database
from gateway.batch.sqlite import SqliteState
from stageline.errors import StagelineError

def put(size):
    return lambda c: c.execute("INSERT INTO notes VALUES (zeroblob(?))", (size,))

async def main():
    database = Database(SqliteState(Path(sys.argv[1])))
    await database.write(lambda c: c.execute("CREATE TABLE notes (note BLOB)"))
    await database.write(put(10))
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
    try:
        await database.write(put(2_000_000))
    except StagelineError as error:
        print(error.code, error.reason)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    await database.write(put(2_000_000))
    print(*await database.read(lambda c: [row["size"] for row in c.execute("SELECT length(note) AS size FROM notes")]))
    database.close()

asyncio.run(main())
"""


def test_a_write_that_finds_no_room_fails_alone_and_the_next_one_succeeds(tmp_path) -> None:
    """A limit of the process stands in for a disk: SQLite sees the write fail in the same place."""
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "state.db")],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert run.stdout.splitlines() == ["RESOURCE_EXHAUSTED STATE_DISK_FULL", "10 2000000"]
