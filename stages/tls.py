"""TLS from PEM files, for servers and channels. Servers read changed files again at the next handshake; channels read
them when they are made. No torch here."""

from __future__ import annotations

import ssl
from collections.abc import Sequence

import grpc

from stageline.errors import ConfigError
from stages.reloaded import Reloaded

_IN_USE: list[grpc.ServerCredentials] = []
"""gRPC's core keeps a bare pointer to credentials that can change, and its servers no reference: they live as long as we."""


class TlsFiles:
    """PEM files: our chain and its key, and the authorities that we accept the other side's chain from."""

    def __init__(self, certificate_file: str, key_file: str, ca_file: str | None = None) -> None:
        """Raises ConfigError for files that cannot be used."""
        self.certificate_file, self.key_file, self.ca_file = certificate_file, key_file, ca_file
        paths = [certificate_file, key_file, *([] if ca_file is None else [ca_file])]
        self._files = Reloaded("TLS certificates", paths, self._parsed)

    def server_credentials(self) -> grpc.ServerCredentials:
        """With `ca_file` clients need a certificate of it."""
        # gRPC asks before every handshake; a configuration that it cannot use leaves the one before in place.
        credentials = grpc.dynamic_ssl_server_credentials(
            self._configuration(), self._configuration, require_client_authentication=self.ca_file is not None
        )
        _IN_USE.append(credentials)
        return credentials

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """As the files are now. Without `ca_file` the system's authorities are trusted."""
        chain, key, *roots = self._files.get()
        return grpc.ssl_channel_credentials(roots[0] if roots else None, key, chain)

    def _configuration(self) -> grpc.ServerCertificateConfiguration:
        chain, key, *roots = self._files.get()
        return grpc.ssl_server_certificate_configuration([(key, chain)], roots[0] if roots else None)

    def _parsed(self, contents: Sequence[bytes]) -> Sequence[bytes]:
        """The contents, if OpenSSL can use them; gRPC itself would not say what is wrong."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        try:
            context.load_cert_chain(self.certificate_file, self.key_file, password=_no_password)
        except (ssl.SSLError, OSError, ValueError) as error:
            raise ConfigError(
                "CERTIFICATE_INVALID",
                f"{self.certificate_file} and {self.key_file} are no PEM certificate chain with its unencrypted key: {error}",
                field="security", path=self.certificate_file,
            ) from None  # fmt: skip
        try:
            for authorities in contents[2:]:
                context.load_verify_locations(cadata=authorities.decode("ascii"))
        except (ssl.SSLError, ValueError) as error:
            raise ConfigError(
                "CERTIFICATE_INVALID", f"{self.ca_file} holds no PEM certificates: {error}", field="security", path=self.ca_file
            ) from None  # fmt: skip
        return contents


def _no_password() -> str:
    raise ValueError("the key is encrypted")  # OpenSSL would ask on the terminal


def tls_files(
    certificate_file: str | None, key_file: str | None, ca_file: str | None, *, names: str
) -> TlsFiles | None:
    """None where nothing is given. Raises ConfigError, which calls the settings by `names`, for a part without the rest."""
    if certificate_file is None and key_file is None and ca_file is None:
        return None
    if certificate_file is None or key_file is None:
        raise ConfigError(
            "TLS_INCOMPLETE", f"{names}: certificate and key belong together; give both", field="security"
        )
    return TlsFiles(certificate_file, key_file, ca_file)
