"""Where the batch state is: sqlite:///PATH. Pure."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from stageline.errors import ConfigError


def path_of(url: str) -> Path:
    """The file of `sqlite:///relative` or `sqlite:////absolute`. Raises ConfigError for any other URL."""
    parts = urlsplit(url)
    if parts.scheme != "sqlite":
        raise ConfigError(
            "STATE_URL_UNSUPPORTED",
            f"batch.state_url: scheme {parts.scheme[:32]!r} is not supported; expected sqlite:///PATH",
            field="batch.state_url", scheme=parts.scheme[:32],
        )  # fmt: skip
    path = unquote(parts.path.removeprefix("/"))
    if parts.netloc or not url.startswith("sqlite:///") or not path or parts.query or path.startswith(":memory:"):
        raise ConfigError(
            "STATE_URL_INVALID",
            f"batch.state_url: expected sqlite:///PATH of a file (an absolute PATH gives four slashes), got {url!r}",
            field="batch.state_url", value=url,
        )  # fmt: skip
    return Path(path)


def url_of(path: Path) -> str:
    """The URL that `path_of` reads as `path`."""
    return f"sqlite:///{quote(str(path))}"
