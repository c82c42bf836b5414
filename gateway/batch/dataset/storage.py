"""Files by path or fsspec URL (s3://, gs://, …). What `write` has returned for is durable, and was written in one piece."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from gateway.batch.dataset.names import SUFFIXES
from stageline.errors import ConfigError, ResourceExhaustedError, StagelineError


@dataclass(frozen=True, slots=True)
class Place:
    """One path of one file system. Cheap to make; holds no connection that a pickle would carry."""

    url: str

    def __truediv__(self, name: str) -> Place:
        return Place(f"{self.url.rstrip('/')}/{name}")

    def open(self) -> tuple[Any, str]:
        """(file system, path on it). Raises ConfigError for a scheme that has no driver here."""
        import fsspec

        try:
            fs, path = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise ConfigError(
                "URL_UNSUPPORTED",
                f"{self.url}: {error}; expected a path, or a URL whose driver is installed (s3: s3fs, gs: gcsfs)",
                url=self.url,
            ) from None
        return fs, path

    def read(self) -> bytes | None:
        """All bytes, None where there is no such file. Raises ConfigError where it cannot be read."""
        fs, path = self.open()
        try:
            data: bytes = fs.cat_file(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise unreadable(self.url, error) from None
        return data

    def exists(self) -> bool:
        """Raises ConfigError where that cannot be found out."""
        fs, path = self.open()
        try:
            return bool(fs.exists(path))
        except OSError as error:
            raise unreadable(self.url, error) from None

    def write(self, data: bytes) -> None:
        """Replace the file in one piece. Raises what `writing` raises."""
        with self.writing() as file:
            file.write(data)

    @contextmanager
    def writing(self) -> Iterator[IO[bytes]]:
        """A new file that takes this one's place when the block has ended; an error in the block leaves the old one.

        Raises ConfigError where it cannot be written, ResourceExhaustedError for a disk that is full.
        """
        fs, path = self.open()
        temporary = f"{path}.{secrets.token_hex(4)}.tmp"
        try:
            if _is_local(fs):
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                try:
                    with open(temporary, "wb") as file:
                        yield file
                        file.flush()
                        os.fsync(file.fileno())
                    os.replace(temporary, path)
                    _sync_folder(Path(path).parent)
                except BaseException:
                    Path(temporary).unlink(missing_ok=True)
                    raise
            else:
                try:
                    with fs.open(temporary, "wb") as file:
                        yield file
                    fs.mv(temporary, path)
                except BaseException:
                    with contextlib.suppress(Exception):
                        fs.rm(temporary)
                    raise
        except OSError as error:
            raise _unwritable(self.url, error) from None

    def names(self) -> list[str]:
        """Names of the files directly below, sorted; none where there is no such folder."""
        fs, path = self.open()
        fs.invalidate_cache()  # others write here
        try:
            found = fs.ls(path, detail=False)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise unreadable(self.url, error) from None
        return sorted(name.rstrip("/").rpartition("/")[2] for name in found if not name.endswith(".tmp"))

    def remove(self) -> None:
        """The file, or the folder with all in it; nothing where it is gone."""
        fs, path = self.open()
        with contextlib.suppress(FileNotFoundError):
            fs.rm(path, recursive=True)


def expand(url: str, without: Sequence[Place] = ()) -> list[tuple[str, int, str]]:
    """(URL, bytes, version) of every .jsonl and .parquet file that a path, folder or pattern names, sorted by URL, but for
    those of `without`: results may lie beside their input.

    The version changes with the content, and may change without. Raises ConfigError where there is none, or a file named
    has another suffix.
    """
    place = Place(url)
    fs, path = place.open()
    try:
        if any(char in path for char in "*?["):
            names = [name for name in fs.glob(path) if name.endswith(SUFFIXES)]
        elif fs.isdir(path):
            names = [name for name in fs.find(path) if name.endswith(SUFFIXES)]
        elif fs.exists(path):
            names = [path]
        else:
            names = []
        left_out = {fs.unstrip_protocol(fs._strip_protocol(one.url)) for one in without}
        found = [
            (full, int(fs.size(name)), str(fs.ukey(name)))
            for name in sorted(names)
            if (full := fs.unstrip_protocol(name)) not in left_out
        ]
    except OSError as error:
        raise unreadable(url, error) from None
    except Exception as error:  # drivers have classes of their own for credentials that are missing
        if _is_local(fs):
            raise
        raise ConfigError("INPUT_UNREADABLE", f"cannot read {url}: {error}", url=url) from None
    if not found:
        raise ConfigError(
            "INPUT_NOT_FOUND",
            f"{url}: there is no such file, and no folder with .jsonl or .parquet files",
            field="input",
        )
    for name, *_ in found:
        if not name.endswith(SUFFIXES):
            raise ConfigError(
                "INPUT_SUFFIX_UNKNOWN", f"{name}: expected a name that ends with .jsonl or .parquet", field="input"
            )
    return found


def unreadable(url: str, error: OSError) -> StagelineError:
    """For a file that cannot be read."""
    return ConfigError("INPUT_UNREADABLE", f"cannot read {url}: {error.strerror or error}", url=url)


def _unwritable(url: str, error: OSError) -> StagelineError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return ResourceExhaustedError("DISK_FULL", f"{url} cannot grow: {error.strerror}; free some space", url=url)
    return ConfigError("OUTPUT_NOT_WRITABLE", f"cannot write {url}: {error.strerror or error}", url=url)


def _is_local(fs: Any) -> bool:
    from fsspec.implementations.local import LocalFileSystem

    return isinstance(fs, LocalFileSystem)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
