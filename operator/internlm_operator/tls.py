"""The job channel's certificates: an authority of the operator's own, kept in a Secret, and what it signs."""

from __future__ import annotations

import asyncio
import base64
import binascii
import ssl
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from internlm_operator.kube import Kube
from internlm_operator.objects import Object

AUTHORITY_DAYS = 3650
SERVER_DAYS = 365
# A certificate that was made a little in the future, by another node's clock, would be refused.
CLOCK_SKEW = timedelta(hours=1)


class SecretError(Exception):
    """The Secret with the authority cannot be used: a sentence that says what to do."""


@dataclass(frozen=True)
class KeyPair:
    """A certificate and its private key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def certificate_pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        return self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )


def service_names(service: str, namespace: str) -> list[str]:
    """The DNS names of a service, as pods may call it."""
    return [
        f"{service}.{namespace}.svc",
        f"{service}.{namespace}.svc.cluster.local",
        f"{service}.{namespace}",
        service,
    ]


def new_authority(now: datetime) -> KeyPair:
    """A self-signed authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name("internlm-operator job channel CA")
    builder = _builder(name, name, key.public_key(), now, AUTHORITY_DAYS)
    certificate = (
        builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(sign_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return KeyPair(certificate, key)


def new_server(authority: KeyPair, names: list[str], now: datetime) -> KeyPair:
    """A server certificate for DNS `names`, the first of them as its common name."""
    key = ec.generate_private_key(ec.SECP256R1())
    issuer = authority.certificate
    identifier = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    # A common name holds 64 characters; who checks names looks at the alternative names anyway.
    builder = _builder(_name(names[0][:64]), issuer.subject, key.public_key(), now, SERVER_DAYS)
    certificate = (
        builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(_usage(sign_certificates=False), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False
        )
        .sign(authority.key, hashes.SHA256())
    )
    return KeyPair(certificate, key)


async def load_authority(kube: Kube, namespace: str, name: str) -> KeyPair:
    """The authority in the Secret `name`; makes it if there is none, so that a restart does not change it.

    Raises SecretError for a Secret that holds something else, ApiError where the API server refuses.
    """
    secret = await kube.get("Secret", namespace, name)
    if secret is None:
        authority = new_authority(datetime.now(UTC))
        # Another operator may have made it in between: then None comes back, and its Secret counts.
        if await kube.create(make_secret(namespace, name, authority)) is not None:
            return authority
        secret = await kube.get("Secret", namespace, name)
    return read_secret(secret or {}, f"Secret {namespace}/{name}")


async def renew_certificate(context: ssl.SSLContext, authority: KeyPair, names: list[str]) -> None:
    """Give `context` a new certificate in good time before the last expires; runs until cancelled."""
    while True:
        await asyncio.sleep(SERVER_DAYS / 2 * 86400)
        load(context, new_server(authority, names, datetime.now(UTC)))


def server_context(server: KeyPair) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    load(context, server)
    return context


def load(context: ssl.SSLContext, pair: KeyPair) -> None:
    """Use `pair` for new connections; Python loads certificates from files only."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "server.pem")
        file.touch(mode=0o600)
        file.write_bytes(pair.key_pem + pair.certificate_pem)
        context.load_cert_chain(file)


def make_secret(namespace: str, name: str, authority: KeyPair) -> Object:
    """The Secret that holds the authority."""
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "type": "kubernetes.io/tls",
        "metadata": {"name": name, "namespace": namespace},
        "data": {
            "tls.crt": base64.b64encode(authority.certificate_pem).decode(),
            "tls.key": base64.b64encode(authority.key_pem).decode(),
        },
    }


def read_secret(secret: Object, where: str) -> KeyPair:
    """The authority in `secret`; SecretError, beginning with `where`, for one that cannot be used."""
    remedy = "delete it, and the operator makes a new one at its next start"
    data = secret.get("data") or {}
    try:
        certificate = x509.load_pem_x509_certificate(base64.b64decode(data["tls.crt"]))
        key = serialization.load_pem_private_key(base64.b64decode(data["tls.key"]), None)
        certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
    except (KeyError, ValueError, TypeError, binascii.Error, x509.ExtensionNotFound) as error:
        raise SecretError(f"{where}: holds no certificate authority ({error}); {remedy}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise SecretError(f"{where}: the key does not belong to the certificate; {remedy}")
    if certificate.not_valid_after_utc < datetime.now(UTC) + timedelta(days=30):
        raise SecretError(f"{where}: expires on {certificate.not_valid_after_utc:%Y-%m-%d}; {remedy}")
    return KeyPair(certificate, key)


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime, days: int
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + timedelta(days=days))
    )


def _usage(sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
