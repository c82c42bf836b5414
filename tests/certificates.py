"""Certificate authorities for tests; files appear whole, as a mounted Secret's do."""

from __future__ import annotations

import datetime
import ipaddress
import os
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

DAY = datetime.timedelta(days=1)


class Authority:
    """Signs certificates of 127.0.0.1 and of the name `stage.test`."""

    def __init__(self, name: str) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate = self._builder(self._name, self._key, expired=False)
        certificate = certificate.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        self.pem = certificate.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def sign(self, *, expired: bool = False, address: str = "127.0.0.1") -> tuple[bytes, bytes]:
        """Certificate and key as PEM, valid until tomorrow or until yesterday."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "leaf")])
        names = [x509.IPAddress(ipaddress.ip_address(address)), x509.DNSName("stage.test")]
        builder = self._builder(subject, key, expired=expired)
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM), key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )

    def issue(self, folder: Path, *, trusts: Authority | None = None, **options) -> dict[str, str]:
        """Write certificate, key and the authority to trust; returns their paths as settings call them."""
        certificate, key = self.sign(**options)
        folder.mkdir(exist_ok=True)
        replace(folder / "ca.pem", (trusts or self).pem)
        replace(folder / "tls.pem", certificate)
        replace(folder / "tls.key", key)
        return {
            "certificate_file": str(folder / "tls.pem"),
            "key_file": str(folder / "tls.key"),
            "ca_file": str(folder / "ca.pem"),
        }

    def _builder(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, *, expired: bool
    ) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - 3 * DAY)
            .not_valid_after(now - DAY if expired else now + DAY)
        )


def replace(path: Path, content: bytes) -> None:
    """All at once."""
    new = path.with_suffix(path.suffix + ".new")
    new.write_bytes(content)
    os.replace(new, path)
