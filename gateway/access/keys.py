"""API keys and the file of tenants that holds their hashes.

A key is `sl-ID-SECRET`: twelve and 64 hexadecimal digits. The file holds the SHA-256 of the whole key: with 256 random bits
there is nothing to guess, so a slow hash would only slow the door.
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from gateway.types import MAX_PRIORITY
from stageline.errors import ConfigError, UnauthenticatedError

ID_BYTES, SECRET_BYTES = 6, 32
_KEY = re.compile(rf"sl-([0-9a-f]{{{2 * ID_BYTES}}})-[0-9a-f]{{{2 * SECRET_BYTES}}}")
_NOBODY = "0" * 64  # no key has this hash: comparing with it takes as long as comparing with one


def _with_zone(value: datetime.datetime) -> datetime.datetime:
    return value if value.tzinfo is not None else value.replace(tzinfo=datetime.UTC)


Moment = Annotated[datetime.datetime, AfterValidator(_with_zone)]  # without a zone: UTC


class StoredKey(BaseModel):
    """What is kept of a key."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    id: str = Field(pattern=rf"^[0-9a-f]{{{2 * ID_BYTES}}}$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", repr=False)
    created: Moment | None = None
    expires: Moment | None = None


class Tenant(BaseModel):
    """Who pays, what for, and how much of it. What is None has no limit.

    A minute's worth can be used at once. Tokens are those of prompts and answers. `concurrent_sequences` counts prompts
    times choices that are being served. An `operator` sees the pipelines and what the stages do.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    keys: tuple[StoredKey, ...] = ()
    requests_per_minute: int | None = Field(None, ge=1)
    tokens_per_minute: int | None = Field(None, ge=1)
    concurrent_sequences: int | None = Field(None, ge=1)
    max_priority: int = Field(0, ge=-MAX_PRIORITY, le=MAX_PRIORITY)
    operator: bool = False


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    tenants: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")], Tenant] = Field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class KeyHolder:
    """Whose key it is, by names that may be written to logs."""

    tenant: str
    key_id: str


class Tenants:
    """A file of tenants as it was when it was read."""

    def __init__(self, tenants: Mapping[str, Tenant]) -> None:
        """Raises ConfigError where two keys have one id."""
        self.tenants = dict(tenants)
        self._keys: dict[str, tuple[str, StoredKey]] = {}
        for name, tenant in self.tenants.items():
            for key in tenant.keys:
                if key.id in self._keys:
                    raise ConfigError("KEYS_INVALID", f"two keys have the id {key.id}", field="security.keys_file")
                self._keys[key.id] = name, key

    def holder(self, key: str, now: datetime.datetime) -> KeyHolder:
        """Raises UnauthenticatedError: API_KEY_WRONG, or API_KEY_EXPIRED for one that was right."""
        form = _KEY.fullmatch(key)
        name, stored = self._keys.get(form[1], ("", None)) if form else ("", None)
        expected = _NOBODY if stored is None else stored.sha256
        right = hmac.compare_digest(digest(key), expected)
        if stored is None or not right:
            raise UnauthenticatedError("API_KEY_WRONG", "the API key is not known here; check it, or ask for a new one")
        if stored.expires is not None and stored.expires <= now:
            raise UnauthenticatedError(
                "API_KEY_EXPIRED", f"the API key {stored.id} has expired; ask for a new one", key_id=stored.id
            )
        return KeyHolder(name, stored.id)


def digest(key: str) -> str:
    """What is stored of a key: SHA-256, hexadecimal."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def new_key(now: datetime.datetime, expires: datetime.datetime | None) -> tuple[str, StoredKey]:
    """A key, which nobody can show again, and what is stored of it."""
    key_id = secrets.token_hex(ID_BYTES)
    key = f"sl-{key_id}-{secrets.token_hex(SECRET_BYTES)}"
    return key, StoredKey(id=key_id, sha256=digest(key), created=now.replace(microsecond=0), expires=expires)


def parse(contents: Sequence[bytes]) -> Tenants:
    """The file of tenants. Raises ConfigError that names the place, never what stands there: it might be a key."""
    try:
        data: Any = yaml.safe_load(contents[0].decode("utf-8"))
        return Tenants(_File.model_validate({} if data is None else data).tenants)
    except UnicodeDecodeError:
        problem = "it is not UTF-8"
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        problem = "it is not YAML" + (f" (line {mark.line + 1})" if mark is not None else "")
    except yaml.YAMLError:
        problem = "it is not YAML"
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        problem = f"{'.'.join(map(str, first['loc'])) or 'the top'}: {first['msg']}"
    raise ConfigError(
        "KEYS_INVALID", f"the file of API keys cannot be used: {problem}; `stageline keys create` writes one",
        field="security.keys_file",
    )  # fmt: skip


def dump(tenants: Mapping[str, Tenant]) -> str:
    """The file as YAML."""
    data = {name: tenant.model_dump(mode="json", exclude_defaults=True) for name, tenant in tenants.items()}
    return yaml.safe_dump({"tenants": data}, sort_keys=False)
