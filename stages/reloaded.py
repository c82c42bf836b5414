"""A value made of files that are replaced while we run: certificates, tokens, keys. No torch here."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from stageline.errors import ConfigError

_LOG = logging.getLogger("stageline.security")

T = TypeVar("T")
_Stamp = tuple[tuple[int, int, int], ...]


class Reloaded(Generic[T]):
    """`parse(contents)` of the files' bytes, made again when one of them changes. Safe to use from several threads.

    `parse` raises ConfigError, without what may be secret in it. The first time it leaves the constructor, as does a file
    that cannot be read; later the value from before is kept and the log says so once for each change: half of a
    replacement may be all there is yet.
    """

    def __init__(self, what: str, paths: Sequence[str], parse: Callable[[Sequence[bytes]], T]) -> None:
        """`what` names it in messages."""
        self._what, self._paths, self._parse = what, tuple(paths), parse
        self._lock = threading.Lock()
        self._stamp = self._look()  # before the contents: a change in between is seen the next time
        self._value = self._load()

    def get(self) -> T:
        """The value as the files are now; costs a stat of each."""
        with self._lock:
            stamp = self._look()
            if stamp != self._stamp:
                self._stamp = stamp
                try:
                    self._value = self._load()
                    _LOG.info("%s: read again from %s", self._what, ", ".join(self._paths))
                except ConfigError as error:
                    _LOG.error("%s: keeping what was read before: %s", self._what, error.message)
            return self._value

    def _look(self) -> _Stamp | None:
        try:
            stats = [os.stat(path) for path in self._paths]
        except OSError:
            return None
        return tuple((stat.st_mtime_ns, stat.st_size, stat.st_ino) for stat in stats)

    def _load(self) -> T:
        contents = []
        for path in self._paths:
            try:
                contents.append(Path(path).read_bytes())
            except OSError as error:
                raise ConfigError(
                    "SECURITY_FILE_UNREADABLE", f"{self._what}: {path} cannot be read: {error.strerror}",
                    field="security", path=path,
                ) from None  # fmt: skip
        return self._parse(contents)
