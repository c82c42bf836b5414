"""Fill a folder with a hub model: `python -m stages.download --model Qwen/Qwen2-72B --into /models/Qwen2-72B`.

Killed at any time and started again, it goes on where it was. Every file is compared with the hub's checksum and every
tensor with the model; only then is the mark written that others wait for. No torch here.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError

from stageline.errors import CheckpointError, ConfigError, InvalidArgumentError, ResourceExhaustedError, StagelineError
from stages.checkpoint import open_checkpoint
from stages.hub import METADATA_FILES, typed
from stages.partition import LayerRange

MARK = ".stageline-complete"
_VERIFIED = ".stageline-verified.json"
_CHUNK_BYTES = 16 << 20
MAX_IDLE_TRIES = 4
_RESERVE_BYTES = 1 << 30  # left free on the volume


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file of a commit. `checksum` is the SHA-256 of a large file's content, else git's SHA-1 of it as a blob."""

    name: str
    size_bytes: int
    checksum: str


def list_files(repo_id: str, revision: str | None) -> tuple[str, list[HubFile]]:
    """The commit that `revision` (branch, tag, commit) is now, and the files a model needs: metadata and safetensors.

    Raises as `stages.hub.fetch_metadata`.
    """
    info = typed(
        repo_id, revision, lambda: huggingface_hub.HfApi().model_info(repo_id, revision=revision, files_metadata=True)
    )
    files = []
    for entry in info.siblings or []:
        if entry.rfilename in METADATA_FILES or (
            entry.rfilename.endswith(".safetensors") and "/" not in entry.rfilename
        ):
            checksum = entry.lfs.sha256 if entry.lfs is not None else entry.blob_id
            assert entry.size is not None, "files_metadata=True asks for sizes"
            assert checksum is not None
            files.append(HubFile(entry.rfilename, entry.size, checksum))
    if not any(file.name.endswith(".safetensors") for file in files):
        raise CheckpointError(
            "HUB_FILE_MISSING", f"hub model {repo_id!r} has no .safetensors files; weights are read from those only"
        )
    assert info.sha is not None
    return info.sha, sorted(files, key=lambda file: file.name)


def download(repo_id: str, revision: str | None, folder: Path) -> dict[str, Any]:
    """Make `folder` a verified copy of the model; returns what the mark says (model, commit, fingerprint).

    Raises those of `list_files`; ConfigError where the folder holds another model or commit; ResourceExhaustedError
    where the volume is too small; CheckpointError for a file that does not have the hub's checksum (it is removed, so that
    the next run fetches it again) or a tensor that is not the model's.
    """
    commit, files = list_files(repo_id, revision)
    identity = {"model": repo_id, "commit": commit}
    verified = _read(folder / _VERIFIED) or {**identity, "files": {}}
    if {key: verified.get(key) for key in identity} != identity:
        raise ConfigError(
            "FOLDER_HOLDS_OTHER_MODEL",
            f"{folder} holds {verified.get('model')} at commit {verified.get('commit')}, not {repo_id} at {commit}; "
            "use another folder, or give that commit as --revision",
            field="into",
            folder=folder,
        )
    folder.mkdir(parents=True, exist_ok=True)
    _check_space(folder, files)
    for number, file in enumerate(files, start=1):
        path = folder / file.name
        if _unchanged(path, file, verified["files"].get(file.name)):
            continue
        print(f"{number}/{len(files)} {file.name} ({file.size_bytes:,} bytes)", file=sys.stderr, flush=True)
        part = path.with_name(file.name + ".part")
        typed(repo_id, commit, functools.partial(_fetch, repo_id, commit, file, part))
        _verify(part, file)
        part.replace(path)
        verified["files"][file.name] = [file.checksum, file.size_bytes, path.stat().st_mtime_ns]
        _write(folder / _VERIFIED, verified)
    checkpoint = open_checkpoint(str(folder))
    checkpoint.verify_index(LayerRange(0, checkpoint.config.num_layers))
    mark = {**identity, "fingerprint": checkpoint.fingerprint}
    _write(folder / MARK, mark)
    return mark


def _fetch(repo_id: str, commit: str, file: HubFile, part: Path) -> None:
    """Append to `part` what it lacks. huggingface_hub's own download starts a file anew in every process, and a shard
    has 4 GB. Raises what the hub's client raises, after as many tries without a byte as MAX_IDLE_TRIES."""
    client: Any = huggingface_hub.utils  # exports these three, without saying so to type checkers
    url = huggingface_hub.hf_hub_url(repo_id, file.name, revision=commit)
    idle_tries = 0
    while True:
        have = part.stat().st_size if part.exists() else 0
        if have > file.size_bytes:
            part.unlink()
            have = 0
        if have == file.size_bytes and part.exists():
            return
        headers = {**client.build_hf_headers(), "Accept-Encoding": "identity", "Range": f"bytes={have}-"}
        try:
            with client.get_session().stream(
                "GET", url, headers=headers, follow_redirects=True, timeout=60
            ) as response:
                if response.status_code == 416:  # a file of no bytes
                    part.touch()
                    return
                client.hf_raise_for_status(response)
                with _writing(part, "ab" if response.status_code == 206 else "wb") as stream:
                    for chunk in response.iter_raw():
                        stream.write(chunk)
        except (StagelineError, HfHubHTTPError):
            raise
        except Exception:  # the connection broke; which class says so depends on the version of the hub's client
            idle_tries = idle_tries + 1 if (part.stat().st_size if part.exists() else 0) <= have else 0
            if idle_tries >= MAX_IDLE_TRIES:
                raise
            time.sleep(idle_tries)


@contextlib.contextmanager
def _writing(path: Path, mode: str) -> Iterator[IO[bytes]]:
    """Open for writing; raises ResourceExhaustedError for a full disk, ConfigError for what else the volume refuses."""
    try:
        with path.open(mode) as stream:
            yield stream
    except HfHubHTTPError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceExhaustedError(
                "DISK_FULL", f"{path.parent} is full: enlarge the volume", folder=path.parent
            ) from None
        raise ConfigError(
            "FOLDER_NOT_WRITABLE", f"{path}: {error.strerror}", field="into", folder=path.parent
        ) from None


def _check_space(folder: Path, files: Sequence[HubFile]) -> None:
    present = sum((folder / file.name).stat().st_size for file in files if (folder / file.name).exists())
    partial = sum(path.stat().st_size for path in folder.glob("*.part"))
    missing = max(0, sum(file.size_bytes for file in files) - present - partial)
    free = shutil.disk_usage(folder).free
    if missing and free < missing + _RESERVE_BYTES:
        raise ResourceExhaustedError(
            "DISK_FULL",
            f"{folder} has {free:,} bytes free; {missing:,} are still to come, and 1 GiB stays free: enlarge the volume",
            folder=folder,
            free_bytes=free,
            missing_bytes=missing,
        )


def _unchanged(path: Path, file: HubFile, seen: Sequence[Any] | None) -> bool:
    """Whether this very file was verified by an earlier run: hashing 145 GB again takes minutes."""
    return (
        seen is not None and path.exists() and list(seen) == [file.checksum, file.size_bytes, path.stat().st_mtime_ns]
    )


def _verify(path: Path, file: HubFile) -> None:
    large = len(file.checksum) == 64
    digest = hashlib.sha256() if large else hashlib.sha1(usedforsecurity=False)
    if not large:
        digest.update(f"blob {path.stat().st_size}\0".encode())
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    if digest.hexdigest() != file.checksum:
        path.unlink()
        raise CheckpointError(
            "CHECKSUM_WRONG",
            f"{path.name}: checksum {digest.hexdigest()}, the hub says {file.checksum}; it was removed, run again",
            path=path,
        )


def _read(path: Path) -> dict[str, Any] | None:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        data = None
    if not isinstance(data, dict) or not isinstance(data.get("files"), dict):
        raise CheckpointError("METADATA_UNREADABLE", f"{path} is damaged; remove it and run again", path=path)
    return data


def _write(path: Path, data: dict[str, Any]) -> None:
    """Write atomically: a reader sees the old file or the new one, also after a crash."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        json.dump(data, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 when the folder is complete, 2 for wrong input, 1 for what may pass (the network, a full disk)."""
    parser = argparse.ArgumentParser(prog="python -m stages.download", description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", required=True, help="hub id such as Qwen/Qwen2-72B")
    parser.add_argument("--revision", default="main", help="branch, tag or commit")
    parser.add_argument("--into", required=True, type=Path, help="folder to fill")
    args = parser.parse_args(argv)
    try:
        print(json.dumps(download(args.model, args.revision, args.into)))
    except StagelineError as error:
        print(f"stages.download: {error.message} [{error.reason}]", file=sys.stderr)
        return 2 if isinstance(error, InvalidArgumentError) and error.reason != "CHECKSUM_WRONG" else 1
    except OSError as error:
        print(f"stages.download: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
