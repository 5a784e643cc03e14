"""What the processes of a federation know each other by: a certificate for the server, a key pair for each client."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

DAYS = 30
Key = ec.EllipticCurvePrivateKey


def write_certificates(folder: Path) -> None:
    """Write ca.crt, server.crt and server.key (PEM) for a server on this machine, valid for 30 days.

    The authority's own key is never written: nobody can sign a second certificate with it.
    """
    authority, server = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    name, host = _name("fedlab-kit authority"), _name("localhost")
    ca = _certificate(name, name, authority).add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    names = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1"))])
    certificate = _certificate(host, name, server).add_extension(names, critical=False)
    (folder / "ca.crt").write_bytes(_pem(ca.sign(authority, hashes.SHA384())))
    (folder / "server.crt").write_bytes(_pem(certificate.sign(authority, hashes.SHA384())))
    _write_private(folder / "server.key", server, serialization.PrivateFormat.PKCS8)


def write_key(path: Path) -> None:
    """Write a P-384 key pair in OpenSSH's format: the private half at `path`, the public one beside it as .pub."""
    key = ec.generate_private_key(ec.SECP384R1())
    _write_private(path, key, serialization.PrivateFormat.OpenSSH)
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    path.with_name(f"{path.name}.pub").write_bytes(public)


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _certificate(subject: x509.Name, issuer: x509.Name, key: Key) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(days=DAYS))
    )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _write_private(path: Path, key: Key, form: serialization.PrivateFormat) -> None:
    path.touch(mode=0o600)
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
