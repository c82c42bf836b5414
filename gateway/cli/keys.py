"""Make, list and revoke API keys in a file of tenants; a running gateway reads the file again by itself."""

from __future__ import annotations

import argparse
import datetime
import os
import sys
from pathlib import Path

from gateway.access import keys
from gateway.access.keys import Tenant, Tenants
from stageline.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `stageline keys`."""
    verbs = parser.add_subparsers(dest="what", required=True, metavar="create | list | revoke")
    create = verbs.add_parser("create", help="make a key, print it once, store its hash")
    create.add_argument("--tenant", required=True, help="whose key it is; a new name is a new tenant without limits")
    create.add_argument("--expires-days", type=float, help="days until it is refused; default: never")
    show = verbs.add_parser("list", help="tenants, their limits and the ids of their keys")
    revoke = verbs.add_parser("revoke", help="remove a key")
    revoke.add_argument("--id", required=True, help="as `list` shows it: twelve hexadecimal digits, no secret")
    for verb in (create, show, revoke):
        verb.add_argument("--file", required=True, metavar="FILE", help="security.keys_file; made where there is none")


def run(args: argparse.Namespace) -> int:
    """Change the file, or show it."""
    path = Path(args.file)
    tenants = _read(path).tenants
    if args.what == "create":
        return _create(path, tenants, args.tenant, args.expires_days)
    if args.what == "revoke":
        return _revoke(path, tenants, args.id)
    for name, tenant in tenants.items():
        limits = tenant.model_dump(exclude={"keys"}, exclude_defaults=True)
        print(" ".join([f"tenant {name}", *(f"{limit}={value}" for limit, value in limits.items())]))
        for key in tenant.keys:
            until = f"expires {key.expires:%Y-%m-%d %H:%M %Z}" if key.expires else "does not expire"
            print(f"  {key.id}  created {key.created:%Y-%m-%d}  {until}" if key.created else f"  {key.id}  {until}")
    return 0


def _create(path: Path, tenants: dict[str, Tenant], name: str, expires_days: float | None) -> int:
    now = datetime.datetime.now(datetime.UTC)
    if expires_days is not None and not 0 < expires_days < 36_525:
        raise ConfigError(
            "CONFIG_INVALID", f"--expires-days must be over 0, got {expires_days}", field="--expires-days"
        )
    expires = None if expires_days is None else (now + datetime.timedelta(days=expires_days)).replace(microsecond=0)
    key, stored = keys.new_key(now, expires)
    tenant = tenants.get(name, Tenant())
    _write(path, {**tenants, name: tenant.model_copy(update={"keys": (*tenant.keys, stored)})})
    print(f"stageline keys: key {stored.id} of tenant {name}; it is shown this once", file=sys.stderr, flush=True)
    print(key)
    return 0


def _revoke(path: Path, tenants: dict[str, Tenant], key_id: str) -> int:
    for name, tenant in tenants.items():
        left = tuple(key for key in tenant.keys if key.id != key_id)
        if len(left) < len(tenant.keys):
            _write(path, {**tenants, name: tenant.model_copy(update={"keys": left})})
            return 0
    raise ConfigError(
        "KEY_NOT_FOUND", f"{path} has no key with the id {key_id[:64]!r}; see `stageline keys list`", field="--id"
    )


def _read(path: Path) -> Tenants:
    try:
        return keys.parse([path.read_bytes()])
    except FileNotFoundError:
        return Tenants({})
    except OSError as error:
        raise ConfigError("KEYS_FILE_UNREADABLE", f"{path} cannot be read: {error.strerror}", path=path) from None


def _write(path: Path, tenants: dict[str, Tenant]) -> None:
    """All at once, so that a gateway never reads half of it; readable to this user only where it is new."""
    text = keys.dump(tenants)
    keys.parse([text.encode()])  # a tenant's name may be wrong
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        mode = path.stat().st_mode & 0o777 if path.exists() else 0o600
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise ConfigError("KEYS_FILE_NOT_WRITABLE", f"{path} cannot be written: {error.strerror}", path=path) from None
