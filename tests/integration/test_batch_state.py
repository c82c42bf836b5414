"""The batch state: whose it is, what survives a database that ends, and what its URL may show."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from postgres_server import PostgresServer
from test_batch import flags, line, records, run, write

from gateway import config as configuration
from gateway.batch import files, store
from gateway.batch.connection import StateFenced
from gateway.batch.database import Database
from gateway.batch.opening import open_state
from gateway.batch.service import BatchService
from gateway.cli import main
from stageline.errors import (
    ConfigError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    UnavailableError,
)
from tests.tiny import save_tiny

END_SESSIONS = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'stageline batches'"


def begin(file_id: str):
    return lambda c: files.begin(c, "", file_id, "in.jsonl", 1)


async def names(database: Database) -> list[str]:
    rows = await database.read(lambda c: c.execute("SELECT id FROM files ORDER BY rowid").fetchall())
    return [row["id"] for row in rows]


def test_a_state_belongs_to_one_server(state_url) -> None:
    first = Database(open_state(state_url))
    with pytest.raises(ConfigError, match="another server uses it") as error:
        Database(open_state(state_url, lock_timeout_s=0.2))
    assert error.value.reason == "STATE_IN_USE"
    assert "s3cret" not in str(error.value) + str(error.value.metadata)
    first.close()
    Database(open_state(state_url)).close()


def test_states_of_another_program_are_left_alone(postgres, tmp_path) -> None:
    (tmp_path / "text.db").write_text("not a database, but long enough to be looked at " * 30)
    with pytest.raises(ConfigError, match="cannot be used"):
        Database(open_state(f"sqlite:///{tmp_path}/text.db"))
    url = postgres.new_database()
    postgres.execute(url, "CREATE SCHEMA stageline; CREATE TABLE stageline.files (name TEXT)")
    with pytest.raises(ConfigError, match="not of this version"):
        Database(open_state(url))
    url = postgres.new_database()
    Database(open_state(url)).close()
    postgres.execute(url, "UPDATE stageline.owner SET version = version + 1")
    with pytest.raises(ConfigError, match="not of this version"):
        Database(open_state(url))


async def test_a_job_that_fails_fails_alone(state_url) -> None:
    database = Database(open_state(state_url))

    def refuse(connection) -> None:
        files.begin(connection, "", "file-refused", "", 1)
        raise NotFoundError("GONE", "gone")

    def stumble(connection) -> None:
        files.begin(connection, "", "file-stumbled", "", 1)
        connection.execute("INSERT INTO nothing VALUES (1)")

    outcomes = await asyncio.gather(
        *(database.write(job) for job in (begin("a"), refuse, begin("b"), stumble, begin("c"))), return_exceptions=True
    )
    assert [type(outcome).__name__ for outcome in outcomes] == [
        "NoneType", "NotFoundError", "NoneType", "InternalError", "NoneType",
    ]  # fmt: skip
    assert await names(database) == ["a", "b", "c"]
    database.close()


async def test_pages_are_bounded_by_bytes(state_url) -> None:
    database = Database(open_state(state_url))
    lines = [b"x" * 400_000 + b"%d\n" % i for i in range(7)] + [b"short\n"] * 5000
    await database.write(begin("file-1"))
    await database.write(lambda c: files.append(c, "file-1", 1, lines))
    await database.write(lambda c: files.complete(c, "", "file-1", len(lines) + 1, [b"last"], 5))
    read, pages, after = [], [], 0
    while page := await database.read(lambda c, after=after: files.page(c, "", "file-1", after)):
        pages.append(len(page))
        read += [data for _, data in page]
        after = page[-1][0]
    assert read == [*lines, b"last"]
    assert pages[:2] == [3, 3]
    database.close()


def test_lines_are_counted_once_whatever_happens_to_postgres(children, postgres, tmp_path, capsys) -> None:
    """PostgreSQL is killed in the middle of a batch, several times, and once the gateway too."""
    source, out = write(tmp_path / "in.jsonl", [line(f"r-{i}") for i in range(200)]), tmp_path / "out.jsonl"
    done, kills = threading.Event(), 0
    with children.toy_gateway(state_url=postgres.new_database()) as server:

        def trouble() -> None:
            nonlocal kills
            while kills < 3 and not done.wait(0.8):
                postgres.kill()
                kills += 1
                done.wait(0.3)
                if kills == 2:
                    server.kill()
                postgres.start()
                if kills == 2:
                    server.start()

        thread = threading.Thread(target=trouble)
        thread.start()
        try:
            code = 1
            while code == 1:  # where its very first call meets a database that is away; the same command again goes on
                code, batch, err = run(capsys, "submit", source, "--output-file", out, "--wait", *flags(server))
        finally:
            done.set()
            thread.join()
    assert code == 0, err
    assert kills >= 2
    assert batch["request_counts"] == {"total": 200, "completed": 200, "failed": 0}
    assert [answer["custom_id"] for answer in records(out)] == [f"r-{i}" for i in range(200)]


async def test_a_connection_that_is_lost_is_opened_again(postgres) -> None:
    url = postgres.new_database()
    database = Database(open_state(url))
    await database.write(begin("a"))
    assert await names(database) == ["a"]
    await asyncio.to_thread(postgres.execute, url, END_SESSIONS)
    assert await names(database) == ["a"]
    await database.write(begin("b"))
    # In the middle of a transaction: the whole of it runs again.
    runs = []

    def ends_itself(connection) -> None:
        runs.append(1)
        files.begin(connection, "", "c", "", 1)
        if len(runs) == 1:
            connection.execute("SELECT pg_terminate_backend(pg_backend_pid())")

    await database.write(ends_itself)
    assert len(runs) == 2
    assert await names(database) == ["a", "b", "c"]
    with pytest.raises(ConfigError, match="another server uses it"):  # the new session has the lock
        await asyncio.to_thread(Database, open_state(url, lock_timeout_s=0.2))
    database.close()


async def test_while_postgres_is_away_callers_are_told_to_come_back(postgres, monkeypatch) -> None:
    monkeypatch.setattr("gateway.batch.database.PATIENCE_S", 0.5)
    database = Database(open_state(postgres.new_database()))
    await asyncio.to_thread(postgres.kill)
    for call in (database.write, database.write, database.read):  # one that met the loss, one that came later
        with pytest.raises(UnavailableError, match="does not answer") as error:
            await call(begin("a"))
        assert error.value.reason == "STATE_UNREACHABLE"
        assert float(error.value.metadata["retry_after_s"]) > 0
        assert "s3cret" not in str(error.value)
    await asyncio.to_thread(postgres.start)
    await database.write(begin("a"))
    assert await names(database) == ["a"]
    database.close()


async def test_a_server_that_lost_the_state_writes_no_more(postgres) -> None:
    url = postgres.new_database()
    free: asyncio.Queue[int] = asyncio.Queue()
    started = 0

    async def answer(*_: object) -> dict:
        nonlocal started
        started += 1
        return {"usage": {"prompt_tokens": await free.get(), "completion_tokens": 0}}

    database = Database(open_state(url))
    service = BatchService(database, answer, max_concurrency=2, max_lines=100, max_file_bytes=1 << 20)
    await service.start()
    file_id = await service.create_file("", "in.jsonl")
    await service.write_file("", file_id, 0, "\n".join(line(f"r-{i}") for i in range(9)).encode())
    await service.complete_file("", file_id)
    batch = await service.create_batch("", file_id)
    assert batch.total == 9
    while started < 2:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(Database, open_state(url))  # a second server, queued for the lock
        query = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
        while (await asyncio.to_thread(postgres.execute, url, query))[0][0] == 0:
            pass
        await asyncio.to_thread(
            postgres.execute,
            url,
            f"{END_SESSIONS} AND pid IN (SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND granted)",
        )
        second = await asyncio.wrap_future(waiting)
    free.put_nowait(5)  # a line of the first server ends
    with pytest.raises(StateFenced, match="another server took the batch state"):
        await database.write(begin("a"))
    with pytest.raises(StateFenced):
        await service.get_batch("", batch.id)
    async with asyncio.timeout(10):
        while service.backlog_tokens():  # noqa: ASYNC110  # its worker ends
            await asyncio.sleep(0.01)
    assert (await second.read(lambda c: store.find(c, "", batch.id))).completed == 0
    await second.write(begin("b"))
    assert started == 2
    await service.stop()
    second.close()


async def test_a_write_that_finds_no_room_fails_and_the_next_one_succeeds(postgres) -> None:
    """A limit of the writer's process stands in for a disk: PostgreSQL sees a short write in the same place."""
    url = postgres.new_database()
    database = Database(open_state(url))
    await database.write(begin("file-1"))
    holder = "SELECT pid FROM pg_locks WHERE locktype = 'advisory'"
    pid = (await asyncio.to_thread(postgres.execute, url, holder))[0][0]
    # Over the log's 16 MiB files, and not a whole number of blocks: the table is extended by a part of one.
    await asyncio.to_thread(postgres.limit_files, pid, 2**24 + 4096)
    lines = [random.Random(i).randbytes(200_000) for i in range(100)]
    with pytest.raises(ResourceExhaustedError, match="cannot grow") as error:
        await database.write(lambda c: files.append(c, "file-1", 1, lines))
    assert error.value.reason == "STATE_DISK_FULL"
    await asyncio.to_thread(postgres.limit_files, pid, None)
    await database.write(lambda c: files.append(c, "file-1", 1, lines))
    counted = await database.read(lambda c: c.execute("SELECT count(*) AS number FROM file_lines").fetchone())
    assert counted["number"] == 100
    database.close()


async def test_the_session_is_set_up_whatever_the_roles_defaults_are(postgres) -> None:
    url = postgres.new_database()
    database = url.rsplit("/", 1)[1]
    for setting in ("synchronous_commit = off", "idle_session_timeout = 1000", "search_path = public"):
        await asyncio.to_thread(postgres.execute, url, f"ALTER DATABASE {database} SET {setting}")
    state = Database(open_state(url))
    names = ("synchronous_commit", "idle_session_timeout", "search_path", "tcp_keepalives_idle", "lock_timeout")

    def settings(connection) -> list[str]:
        return [connection.execute(f"SHOW {name}").fetchone()[name] for name in names]

    assert await state.write(settings) == ["on", "0", "stageline", "10", "0"]
    await asyncio.sleep(1.5)  # the idle session is still there
    assert await asyncio.to_thread(
        postgres.execute, url, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"
    ) == [(1,)]
    state.close()


async def test_texts_that_postgres_cannot_keep_are_refused(postgres) -> None:
    database = Database(open_state(postgres.new_database()))
    with pytest.raises(InvalidArgumentError, match="cannot keep"):
        await database.write(lambda c: files.begin(c, "", "file-1", "in\0.jsonl", 1))
    await database.write(begin("file-1"))
    database.close()


@pytest.mark.parametrize("where", ["password", "database", "port"])
def test_a_database_that_cannot_be_used_is_named_without_its_password(postgres: PostgresServer, where) -> None:
    url = {
        "password": postgres.url("postgres").replace("s3cret", "s3cret-wrong"),
        "database": postgres.url("none"),
        "port": postgres.url("postgres").replace(str(postgres.port), "1"),
    }[where]
    with pytest.raises(ConfigError, match=r"cannot be used as PostgreSQL state: .*failed") as error:
        Database(open_state(url))
    assert "s3cret" not in str(error.value) + str(error.value.metadata)


def test_without_psycopg_the_extra_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    monkeypatch.delitem(sys.modules, "gateway.batch.postgres", raising=False)
    with pytest.raises(ConfigError, match=r"stageline\[postgres\]"):
        open_state("postgresql://a@b/c")


def test_the_password_is_shown_nowhere(postgres, tmp_path, monkeypatch, capsys, caplog) -> None:
    url = postgres.new_database()
    monkeypatch.setenv("STAGELINE_BATCH__STATE_URL", url)
    for form in ("yaml", "json"):
        assert main(["config", "--output", form]) == 0
        printed = capsys.readouterr().out
        assert "stageline:***@127.0.0.1" in printed
        assert "s3cret" not in printed
    config = configuration.load(None, {}, {"STAGELINE_BATCH__STATE_URL": url})
    assert config.batch.absolute().state_url == url
    assert "s3cret" not in repr(config)
    monkeypatch.delenv("STAGELINE_BATCH__STATE_URL")
    assert main(["config", "--batch.state-url", url]) == 2
    printed = capsys.readouterr()
    assert "PASSWORD_ON_COMMAND_LINE" in printed.err
    assert "s3cret" not in printed.err + printed.out
    (tmp_path / "wrong.yaml").write_text(json.dumps({"batch": {"state_url": [url]}}))
    assert main(["config", "--config", str(tmp_path / "wrong.yaml")]) == 2
    assert "s3cret" not in capsys.readouterr().err
    with caplog.at_level(logging.DEBUG):
        database = Database(open_state(url))
        postgres.kill()
        time.sleep(0.1)
        postgres.start()
        asyncio.run(database.write(begin("a")))
        database.close()
    assert "connected again" in caplog.text
    assert "s3cret" not in caplog.text


async def test_files_and_a_batch_that_expires(state_url) -> None:
    async def answer(request, tenant: str, request_id: str) -> dict:
        if int(request.custom_id[2:]) > 3:
            await asyncio.sleep(600)
        return {"usage": {"prompt_tokens": 1, "completion_tokens": 1}}

    service = BatchService(
        Database(open_state(state_url)), answer, max_concurrency=3, max_lines=100, max_file_bytes=1 << 20
    )
    await service.start()
    ids = []
    for name in ("first", "second"):
        ids.append(await service.create_file("", name))
        # The last line has no line feed.
        await service.write_file("", ids[-1], 0, "\n".join([*(line(f"r-{i}") for i in range(10)), "no JSON"]).encode())
        for _ in range(2):  # asking again is harmless
            await service.complete_file("", ids[-1])
    assert [file.filename for file in await service.list_files("")] == ["second", "first"]
    batch = await service.create_batch("", ids[0], window_s=2, key="key")
    assert (await service.create_batch("", ids[0], window_s=2, key="key")).id == batch.id
    async with asyncio.timeout(60):
        while (batch := await service.get_batch("", batch.id)).status != "expired":  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    assert batch.total == batch.completed + batch.failed == 11
    assert batch.completed <= 4
    (page,) = [page async for page in service.results("", batch.id, "error", 0)]
    errors = [json.loads(text)["error"] or json.loads(text)["response"] for text in page[0].splitlines()]
    assert [error.get("code") for error in errors] == ["batch_expired"] * (10 - batch.completed) + ["line_not_json"]
    assert (await service.get_file("", batch.error_file_id)).num_bytes == len(page[0])
    await service.delete_file("", batch.error_file_id)
    assert (await service.get_batch("", batch.id)).error_file_id == ""
    await service.delete_batch("", batch.id)
    assert [file.filename for file in await service.list_files("")] == ["second"]
    await service.stop()


def test_serve_says_what_is_wrong_with_its_state(tmp_path, capsys) -> None:
    """Before anything starts: later all that Ray says is that the gateway could not be deployed."""
    save_tiny(tmp_path)
    for url, problem in (
        ("postgresql://me@127.0.0.1:1/db", "cannot be used as PostgreSQL state"),
        (f"sqlite:///{tmp_path}/none/state.db", "No such file or directory"),
        ("redis://me", "'redis' is not supported"),
    ):
        assert main(["serve", "--model", str(tmp_path), "--batch.state-url", url]) == 2
        error = capsys.readouterr().err
        assert problem in error
        assert "Traceback" not in error
