"""What the batch state needs of a database. SQL is written once, for SQLite and PostgreSQL; what differs is in `sqlite` and
`postgres`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

from stageline.errors import UnavailableError


class StateUnreachable(UnavailableError):
    """The connection to the database is lost; of a transaction that was being committed all or nothing is kept."""


class StateFenced(UnavailableError):
    """Another server owns the state now; this one uses it no more."""


class Row(Protocol):
    """Values by the name of their column."""

    def __getitem__(self, name: str, /) -> Any: ...


class Rows(Protocol):
    """What a statement answered."""

    @property
    def rowcount(self) -> int:
        """Of a statement that changes rows, how many."""

    def fetchone(self) -> Any:
        """The next `Row`, or None."""

    def fetchall(self) -> Sequence[Any]:
        """The `Row`s that are left."""

    def __iter__(self) -> Iterator[Any]: ...


class Connection(Protocol):
    """Statements outside of a transaction are committed at once; `?` stands for a parameter."""

    @property
    def in_transaction(self) -> bool:
        """After BEGIN."""

    def execute(self, sql: str, parameters: Sequence[Any] = (), /) -> Rows:
        """Raises the database's own errors; `State.typed` knows them."""

    def executemany(self, sql: str, rows: Iterable[Sequence[Any]], /) -> Rows:
        """As `execute`, for each of `rows`."""

    def close(self) -> None:
        """Harmless where it is closed."""


class State(Protocol):
    """One place for files, batches and results."""

    @property
    def begin_write(self) -> str:
        """The statement."""

    @property
    def begin_read(self) -> str:
        """Of one snapshot, in which nothing can be changed."""

    @property
    def heartbeat_s(self) -> float | None:
        """How often the writer's connection must prove that it holds the state; None: it always does."""

    def open_writer(self) -> Connection:
        """Own the state; called again where the connection was lost, to go on owning it.

        Raises ConfigError where it cannot be used or another server has it; from the second call on StateUnreachable, and
        StateFenced where another server had it meanwhile.
        """

    def open_reader(self) -> Connection:
        """Raises StateUnreachable."""

    def release(self) -> None:
        """Own it no more; the connections are closed."""

    def typed(self, error: Exception) -> Exception:
        """A database's error as a StagelineError; anything else unchanged."""
