"""Who may talk to stages: mutual TLS, a shared token, both, or (on loopback and trusted networks) neither.

Stages and gateway use the same settings: whoever may give steps to a stage is a stage or a gateway.
"""

from __future__ import annotations

import hmac
import logging
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from stageline.errors import ConfigError, UnauthenticatedError
from stages.reloaded import Reloaded
from stages.server.abort import abort
from stages.tls import tls_files

_LOG = logging.getLogger("stageline.security")

AUTHORIZATION = "authorization"
MIN_TOKEN_CHARS = 32
_TOKEN = re.compile(rb"[\x21-\x7e]{%d,1024}" % MIN_TOKEN_CHARS)
_LOG_PERIOD_S = 1.0

Handler = Any  # grpc.RpcMethodHandler, which the stubs describe for the synchronous server only

if TYPE_CHECKING:  # generic in the stubs, not when they run
    _ServerInterceptor = grpc.aio.ServerInterceptor[Any, Any]
    _ClientInterceptor = grpc.aio.UnaryUnaryClientInterceptor[Any, Any]
else:
    _ServerInterceptor, _ClientInterceptor = grpc.aio.ServerInterceptor, grpc.aio.UnaryUnaryClientInterceptor


class StageAccess:
    """What the files say that hold this process's certificate, its key, the authority of all stages and gateways, and tokens.

    A token file has one token a line: the first is sent, every one is accepted, so that tokens can be changed one process
    after the other. `server_name` is expected in a stage's certificate in place of the address it listens on.
    """

    def __init__(
        self,
        *,
        certificate_file: str | None = None,
        key_file: str | None = None,
        ca_file: str | None = None,
        server_name: str | None = None,
        token_file: str | None = None,
    ) -> None:
        """Raises ConfigError where files are missing, cannot be used or do not belong together."""
        self._tls = tls_files(certificate_file, key_file, ca_file, names="TLS between stages")
        if self._tls is not None and ca_file is None:
            raise ConfigError(
                "TLS_INCOMPLETE",
                "TLS between stages is mutual: it needs the authority's certificate too",
                field="security",
            )
        if self._tls is None and server_name is not None:
            raise ConfigError("TLS_INCOMPLETE", "a server name says nothing without certificates", field="security")
        self._server_name = server_name
        self._tokens: Reloaded[tuple[bytes, ...]] | None = None
        if token_file is not None:
            self._tokens = Reloaded("tokens of the stages", [token_file], lambda files: _tokens(files[0], token_file))

    def channel(self, address: str, options: Sequence[tuple[str, Any]]) -> grpc.aio.Channel:
        """To a stage, with the certificates as they are now. Single calls carry the token; streams are given `metadata`."""
        interceptors: Any = [] if self._tokens is None else [_SendToken(self)]
        if self._tls is None:
            return grpc.aio.insecure_channel(address, options=options, interceptors=interceptors)
        if self._server_name is not None:
            options = (*options, ("grpc.ssl_target_name_override", self._server_name))
        credentials = self._tls.channel_credentials()
        return grpc.aio.secure_channel(address, credentials, options=options, interceptors=interceptors)

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What a stream to a stage carries besides its epoch."""
        if self._tokens is None:
            return ()
        return ((AUTHORIZATION, f"Bearer {self._tokens.get()[0].decode('ascii')}"),)

    def server(self, options: Sequence[tuple[str, Any]]) -> grpc.aio.Server:
        """A server that refuses calls without a token, where there are tokens."""
        interceptors = [] if self._tokens is None else [_WantToken(self._tokens)]
        return grpc.aio.server(options=options, interceptors=interceptors)

    def bind(self, server: grpc.aio.Server) -> Callable[[str], int]:
        """What adds a port to a server: with TLS where there are certificates."""
        if self._tls is None:
            return server.add_insecure_port
        credentials = self._tls.server_credentials()
        return lambda address: server.add_secure_port(address, credentials)


OPEN = StageAccess()


class _SendToken(_ClientInterceptor):
    def __init__(self, access: StageAccess) -> None:
        self._access = access

    async def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        metadata = (*(details.metadata or ()), *self._access.metadata())
        return await continuation(details._replace(metadata=grpc.aio.Metadata(*metadata)), request)


class _WantToken(_ServerInterceptor):
    """Refuses every method of every service before a message is read. Any number of them costs a log line a second."""

    def __init__(self, tokens: Reloaded[tuple[bytes, ...]]) -> None:
        self._tokens = tokens
        self._num_refused, self._told_s = 0, 0.0

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]], details: grpc.HandlerCallDetails
    ) -> Handler:
        given = dict(details.invocation_metadata).get(AUTHORIZATION, b"")
        given = given.encode() if isinstance(given, str) else given
        # No shortcut: how long it takes says nothing about which token came near.
        matches = [hmac.compare_digest(b"Bearer " + token, given) for token in self._tokens.get()]
        if any(matches):
            return await continuation(details)
        return grpc.stream_stream_rpc_method_handler(self._refuse)  # of this kind no message is read first

    async def _refuse(self, requests: Any, context: Any) -> None:
        self._num_refused += 1
        if (now_s := time.monotonic()) >= self._told_s + _LOG_PERIOD_S:
            _LOG.warning(
                "refused %d calls without the stages' token, the last from %s", self._num_refused, context.peer()
            )
            self._num_refused, self._told_s = 0, now_s
        await abort(
            context,
            UnauthenticatedError(
                "STAGE_TOKEN_WRONG", "a stage takes calls of its own cluster only: no token, or a wrong one"
            ),
        )


def _tokens(data: bytes, path: str) -> tuple[bytes, ...]:
    tokens = tuple(line.strip() for line in data.splitlines() if line.strip())
    if not tokens or not all(_TOKEN.fullmatch(token) for token in tokens):  # the message must not say any
        raise ConfigError(
            "TOKEN_INVALID",
            f"{path}: expected one token a line, each of {MIN_TOKEN_CHARS} to 1024 printable ASCII characters without "
            "spaces; `openssl rand -hex 32` makes one",
            field="security", path=path,
        )  # fmt: skip
    return tokens
