"""A PostgreSQL server of the tests' own: real, on a loopback port, to be killed and started again."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from glob import glob
from pathlib import Path

import psycopg

from tests.ports import free_ports

USER, PASSWORD = "stageline", "s3cret/w@rd"


def programs() -> Path | None:
    """The folder of initdb and postgres, of the newest version; None where they are not installed."""
    found = [Path(one).parent for one in glob("/usr/lib/postgresql/*/bin/initdb")]
    if there := shutil.which("initdb"):
        found.append(Path(there).parent)
    return max(found, key=lambda path: [int(word) for word in path.parts if word.isdigit()], default=None)


class PostgresServer:
    """One cluster in a temporary folder; asks for a password over TCP."""

    def __init__(self) -> None:
        found = programs()
        assert found is not None
        self._programs, self._databases = found, 0
        self._folder = Path(tempfile.mkdtemp(prefix="stageline-postgres-"))
        # PostgreSQL refuses to run as root.
        self._as: dict[str, object] = (
            {"user": "nobody", "group": "nogroup", "extra_groups": []} if os.getuid() == 0 else {}
        )
        if self._as:
            shutil.chown(self._folder, "nobody", "nogroup")
        [self.port] = free_ports(1)
        (self._folder / "password").write_text(PASSWORD)
        (self._folder / "password").chmod(0o644)
        self._run(
            "initdb", "--pgdata", self._data, "--username", USER, "--auth", "scram-sha-256", "--pwfile",
            self._folder / "password", "--no-sync", "--encoding", "UTF8", "--locale", "C",
        )  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def _data(self) -> Path:
        return self._folder / "data"

    def _run(self, program: str, *arguments: object) -> None:
        subprocess.run(
            [self._programs / program, *map(str, arguments)],
            check=True,
            capture_output=True,
            cwd=self._folder,
            **self._as,
        )  # type: ignore[call-overload]

    def start(self) -> None:
        """Returns once it answers."""
        # Without fsync: what ends here is PostgreSQL, never the system under it.
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    self._programs / "postgres", "-D", self._data, "-h", "127.0.0.1", "-p", str(self.port), "-k", self._folder,
                    "-c", "shared_buffers=16MB", "-c", "max_connections=40", "-c", "fsync=off",
                ],
                stdout=log, stderr=log, cwd=self._folder, **self._as,
            )  # type: ignore[call-overload]  # fmt: skip
        end_s = time.monotonic() + 60
        while True:
            try:
                psycopg.connect(self.url("postgres")).close()
                return
            except psycopg.OperationalError:
                assert self._process.poll() is None, (self._folder / "log").read_text()
                assert time.monotonic() < end_s, "PostgreSQL does not answer"
                time.sleep(0.05)

    def kill(self) -> None:
        """As a power failure would: SIGQUIT ends all of it without writing anything more."""
        assert self._process is not None
        self._process.send_signal(signal.SIGQUIT)
        self._process.wait()

    def close(self) -> None:
        """Nothing is left."""
        self.kill()
        shutil.rmtree(self._folder)

    def url(self, database: str) -> str:
        """With the password."""
        return f"postgresql://{USER}:s3cret%2Fw%40rd@127.0.0.1:{self.port}/{database}"

    def limit_files(self, pid: int, num_bytes: int | None) -> None:
        """How long the files of one of its processes may be; None: as long as they like."""
        soft = "unlimited" if num_bytes is None else num_bytes
        self._run("/usr/bin/prlimit", "--pid", pid, f"--fsize={soft}:")

    def new_database(self) -> str:
        """The URL of an empty one."""
        self._databases += 1
        name = f"test_{self._databases}"
        self.execute("postgres", f"CREATE DATABASE {name}")
        return self.url(name)

    def execute(self, database: str, sql: str) -> list[tuple[object, ...]]:
        """As an administrator would, in a database or at a URL."""
        url = database if "://" in database else self.url(database)
        with psycopg.connect(url, autocommit=True) as connection:
            cursor = connection.execute(sql.encode())
            return cursor.fetchall() if cursor.description else []
