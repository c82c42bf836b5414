"""Requests at a server's HTTP door, tried again while an answer may still come."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import ssl
import time
from dataclasses import dataclass
from typing import Any

import aiohttp

from stageline.client.backoff import Backoff
from stageline.errors import (
    ConfigError,
    PermissionDeniedError,
    ResourceExhaustedError,
    StagelineError,
    UnauthenticatedError,
    UnavailableError,
)

BACKOFF = Backoff(initial_s=0.2, max_s=30.0)
CONNECT_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DoorSettings:
    """`address`: http(s)://HOST:PORT. `request_timeout_s` bounds one attempt, waiting in the server's queue included;
    `give_up_s` the time without any answer."""

    address: str
    api_key: str = ""
    ca_file: str | None = None
    request_timeout_s: float = 3600.0
    give_up_s: float = 600.0


class Door:
    """One server, or the Service before several. Belongs to the event loop that made it."""

    def __init__(self, settings: DoorSettings) -> None:
        """Raises ConfigError for an authority that cannot be read."""
        self._settings = settings
        context: ssl.SSLContext | bool = True
        if settings.ca_file:
            try:
                context = ssl.create_default_context(cafile=settings.ca_file)
            except OSError as error:
                why = error.strerror or "no certificates in PEM"
                raise ConfigError("FILE_UNREADABLE", f"{settings.ca_file} cannot be read: {why}") from None
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ssl=context, socket_factory=_socket),
            timeout=aiohttp.ClientTimeout(total=settings.request_timeout_s, sock_connect=CONNECT_TIMEOUT_S),
            headers={"authorization": f"Bearer {settings.api_key}"} if settings.api_key else {},
        )
        self._heard_s = time.monotonic()

    async def close(self) -> None:
        """End the connections."""
        await self._session.close()

    async def check(self) -> None:
        """Wait for the server. Raises as `ask`."""
        await self._retried("GET", "/v1/models", None, "")

    async def ask(self, url: str, body: dict[str, Any], request_id: str) -> tuple[int, Any]:
        """(HTTP status, the JSON of the answer), an error that stays among them.

        Raises UnauthenticatedError or PermissionDeniedError, which every request would meet, and UnavailableError where
        nobody has answered for `give_up_s`.
        """
        return await self._retried("POST", url, body, request_id)

    async def _retried(self, method: str, url: str, body: dict[str, Any] | None, request_id: str) -> tuple[int, Any]:
        failures, began_s = 0, time.monotonic()
        while True:
            try:
                return await self._once(method, url, body, request_id)
            except (UnavailableError, ResourceExhaustedError) as error:
                now_s = time.monotonic()
                if (
                    error.reason == "SERVER_UNREACHABLE"
                    and now_s - max(began_s, self._heard_s) > self._settings.give_up_s
                ):
                    raise
                retry_after_s = float(error.metadata.get("retry_after_s", 0.0))
                delay_s = BACKOFF.delay_s(failures, random.random(), retry_after_s=retry_after_s)
                assert delay_s is not None  # no deadline was given
                failures += 1
                await asyncio.sleep(delay_s)

    async def _once(self, method: str, url: str, body: dict[str, Any] | None, request_id: str) -> tuple[int, Any]:
        address = self._settings.address.rstrip("/")
        headers = {"x-request-id": request_id} if request_id else {}
        try:
            async with self._session.request(method, address + url, json=body, headers=headers) as answer:
                status, data = answer.status, await answer.read()
                retry_after_s = _seconds(answer.headers.get("retry-after"))
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise _unreachable(address, str(error) or type(error).__name__) from None
        try:
            value = json.loads(data)
            error_fields = None if status == 200 else (value["error"]["code"], value["error"]["message"])
        except (ValueError, KeyError, TypeError):  # Serve's proxy, or another server
            raise _unreachable(address, f"it answers {status} without one of Stageline's errors") from None
        self._heard_s = time.monotonic()
        if error_fields is not None:
            _raise_for(status, str(error_fields[0]).upper(), str(error_fields[1]), retry_after_s)
        return status, value


def _raise_for(status: int, reason: str, message: str, retry_after_s: float) -> None:
    """What is no answer to this request: try again later, or every request would meet it."""
    if status == 503:
        raise UnavailableError(reason, message, retry_after_s=retry_after_s)
    if status == 429:
        raise ResourceExhaustedError(reason, message, retry_after_s=retry_after_s)
    if status in (401, 403):
        kind: type[StagelineError] = UnauthenticatedError if status == 401 else PermissionDeniedError
        raise kind(reason, f"the server refuses our API key: {message}; set STAGELINE_API_KEY or --api-key-file")


def _unreachable(address: str, why: str) -> UnavailableError:
    return UnavailableError(
        "SERVER_UNREACHABLE",
        f"no Stageline server answers at {address}: {why}; what ended is kept, run the command again",
        retry_after_s=0, address=address,
    )  # fmt: skip


def _seconds(text: str | None) -> float:
    return float(text) if text is not None and text.isdigit() else 0.0


def _socket(info: Any) -> socket.socket:
    # Answers take long, and a host that vanished says nothing: ask the peer's kernel.
    made = socket.socket(*info[:3])
    for option, value in ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3)):
        made.setsockopt(socket.IPPROTO_TCP, option, value)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    made.setblocking(False)
    return made
