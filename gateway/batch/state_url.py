"""Where the batch state is: sqlite:///PATH or postgresql://USER@HOST:PORT/DATABASE. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from stageline.errors import ConfigError

# From the first colon after the scheme to the last @: a password that was not quoted may hold anything.
_PASSWORD = re.compile(r"(://[^:/@?]*:)(.+)(?=@)", re.DOTALL)
_QUERY_PASSWORD = re.compile(r"(password=)[^&\s]*", re.IGNORECASE)
_POSTGRES = ("postgresql", "postgres")
POSTGRES_FORM = "postgresql://USER@HOST:PORT/DATABASE"


@dataclass(frozen=True, slots=True)
class PostgresAddress:
    """`parameters`: libpq's, by their names there. `shown`: for people, without the password."""

    shown: str
    parameters: dict[str, str] = field(repr=False)


def without_password(text: str) -> str:
    """A text in which a URL may stand, to be shown."""
    return _QUERY_PASSWORD.sub(r"\1***", _PASSWORD.sub(r"\1***", text))


def parse_url(url: str) -> Path | PostgresAddress:
    """An SQLite file (`sqlite:///relative` or `sqlite:////absolute`) or a PostgreSQL database. Raises ConfigError for anything
    else."""
    scheme = url.partition(":")[0]
    if scheme in _POSTGRES:
        return _postgres(url)
    if scheme != "sqlite":
        raise ConfigError(
            "STATE_URL_UNSUPPORTED",
            f"batch.state_url: scheme {scheme[:32]!r} is not supported; expected sqlite:///PATH or {POSTGRES_FORM}",
            field="batch.state_url", scheme=scheme[:32],
        )  # fmt: skip
    parts = urlsplit(url) if url.startswith("sqlite:///") else None
    path = "" if parts is None or parts.query else unquote(parts.path.removeprefix("/"))
    if not path or path.startswith(":memory:"):
        raise _invalid("sqlite:///PATH of a file (an absolute PATH gives four slashes)", url)
    return Path(path)


def url_of(path: Path) -> str:
    """The URL that `parse_url` reads as `path`."""
    return f"sqlite:///{quote(str(path))}"


def absolute_url(url: str) -> str:
    """The same for a process with another working directory. Raises ConfigError."""
    place = parse_url(url)
    return url_of(place.absolute()) if isinstance(place, Path) else url


def has_password(url: str) -> bool:
    """Whether it must not stand where others read it."""
    return without_password(url) != url


def _postgres(url: str) -> PostgresAddress:
    # Taken apart here, so that libpq never sees the URL: its messages repeat the parts it does not understand.
    try:
        parts = urlsplit(url)
        port, query = parts.port, parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    except ValueError:
        raise _invalid(f"{POSTGRES_FORM}, with special characters of a password as %XX", url) from None
    if any("password" in name.lower() for name, _ in query):
        raise ConfigError(
            "STATE_URL_INVALID", f"batch.state_url: a password stands before the host or in a password file, not after the "
            f"question mark: {without_password(url)!r}", field="batch.state_url",
        )  # fmt: skip
    database = unquote(parts.path.removeprefix("/"))
    if not url.startswith(f"{parts.scheme}://") or not database or "/" in parts.path[1:] or "@" in parts.path:
        raise _invalid(f"{POSTGRES_FORM}, with special characters of a password as %XX", url)
    given = {
        "user": parts.username and unquote(parts.username),
        "password": parts.password and unquote(parts.password),
        "host": parts.hostname and unquote(parts.hostname),
        "port": port and str(port),
        "dbname": database,
    }
    return PostgresAddress(without_password(url), {key: value for key, value in given.items() if value} | dict(query))


def _invalid(expected: str, url: str) -> ConfigError:
    shown = without_password(url)
    return ConfigError(
        "STATE_URL_INVALID",
        f"batch.state_url: expected {expected}, got {shown!r}",
        field="batch.state_url",
        value=shown,
    )
