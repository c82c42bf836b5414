"""URLs of the batch state: what they mean, what is refused, and what of them is shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.batch.state_url import PostgresAddress, has_password, parse_url, url_of, without_password
from stageline.errors import ConfigError


@pytest.mark.parametrize(
    "url",
    [
        "sqlite://state.db", "state.db", "sqlite:///", "sqlite:///a?b=c", "sqlite://[", "mysql://u:s3cret@host/db",
        "postgresql://host", "postgresql:host/db", "postgresql://u@host:port/db", "postgresql://u@a:1,b:2/db",
        "postgresql://u:s3cret/x@host/db", "postgresql://u:s3cret@[host/db", "postgresql://u@host/db?password=s3cret",
        "postgresql://u@host/db?sslpassword=s3cret", "postgresql://u@host/db?sslmode", "postgresql://u@host/db/more",
    ],
)  # fmt: skip
def test_refused(url) -> None:
    with pytest.raises(ConfigError, match=r"batch\.state_url") as error:
        parse_url(url)
    assert "s3cret" not in str(error.value) + str(error.value.metadata)


def test_files(tmp_path) -> None:
    assert parse_url(f"sqlite:///{tmp_path}/a b.db") == tmp_path / "a b.db"
    assert parse_url(url_of(tmp_path / "50% #1.db")) == tmp_path / "50% #1.db"
    place = parse_url("sqlite:///state.db")
    assert isinstance(place, Path)
    assert not place.is_absolute()


@pytest.mark.parametrize(
    ("url", "parameters"),
    [
        ("postgresql:///db", {"dbname": "db"}),
        ("postgres://me@host:6000/db", {"user": "me", "host": "host", "port": "6000", "dbname": "db"}),
        ("postgresql://me:a%40b%3Ac@host/d%20b?sslmode=require&passfile=%2Fx",
         {"user": "me", "password": "a@b:c", "host": "host", "dbname": "d b", "sslmode": "require", "passfile": "/x"}),
        ("postgresql://[::1]:6000/db?host=/run", {"host": "/run", "port": "6000", "dbname": "db"}),
    ],
)  # fmt: skip
def test_databases(url, parameters) -> None:
    place = parse_url(url)
    assert isinstance(place, PostgresAddress)
    assert place.parameters == parameters
    assert "a@b" not in repr(place)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://me:pw@host:1/db", "postgresql://me:***@host:1/db"),
        ("postgresql://me:p@w:/x?y@host/db", "postgresql://me:***@host/db"),
        ("postgresql://me@host/db?a=1&password=pw&b=2", "postgresql://me@host/db?a=1&password=***&b=2"),
    ],
)
def test_passwords_are_hidden(url, shown) -> None:
    assert without_password(url) == shown
    assert has_password(url)


@pytest.mark.parametrize("url", ["postgresql://me@host:1/db", "postgresql://host:1/db", "sqlite:////a:b/c.db", "text"])
def test_what_is_no_password_stays(url) -> None:
    assert without_password(url) == url
    assert not has_password(url)
