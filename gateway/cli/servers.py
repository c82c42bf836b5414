"""Where the servers running on this host listen: one small file each, so that `status` and `chat` find them."""

from __future__ import annotations

import json
import os
import secrets
import tempfile
from pathlib import Path

import grpc

from stageline.errors import ConfigError, StagelineError, UnavailableError
from stageline.grpc_errors import from_rpc_error


def _folder() -> Path:
    return Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()) / f"stageline-{os.getuid()}"


def register(grpc_address: str) -> Path:
    """Write this process's file; the caller removes it at the end."""
    folder = _folder()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / f"{os.getpid()}.json"
    path.write_text(json.dumps({"grpc": grpc_address}))
    return path


def new_stage_token() -> Path:
    """A file with a token for the stages of this server, readable to this user only; the caller removes it at the end."""
    folder = _folder()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    owner = folder.stat()
    if owner.st_uid != os.getuid() or owner.st_mode & 0o077:
        raise ConfigError(
            "FOLDER_NOT_PRIVATE",
            f"{folder} must belong to this user alone (mode 0700); remove it",
            field="XDG_RUNTIME_DIR",
        )
    path = folder / f"{os.getpid()}.token"
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    return path


def find() -> str:
    """The gRPC address of the one server running here. Raises ConfigError where there is none, or more than one."""
    addresses = []
    for path in sorted(_folder().glob("*.json")):
        if _alive(int(path.stem)):
            addresses.append(json.loads(path.read_text())["grpc"])
        else:
            path.unlink(missing_ok=True)  # left behind by a server that was killed
    if len(addresses) != 1:
        found = f"several: {', '.join(addresses)}" if addresses else "none"
        raise ConfigError(
            "SERVER_NOT_FOUND",
            f"expected one server running on this host, found {found}; "
            "start one with `stageline serve`, or give --address HOST:GRPC_PORT",
            field="address",
        )
    return str(addresses[0])


def failure(error: grpc.RpcError, address: str) -> StagelineError:
    """The typed error of a failed call, or that the server at `address` does not answer."""
    typed = from_rpc_error(error)
    if typed.reason == grpc.StatusCode.UNAVAILABLE.name:  # no ErrorInfo: the transport's own words, not the server's
        return UnavailableError("SERVER_UNREACHABLE", f"the server at {address} does not answer", address=address)
    return typed


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
