"""The job channel's certificates: an authority of the operator's own, kept in a Secret, and what it signs.

Everything is renewed while the operator runs.  An authority that nears its end gets a successor, which the
workers trust (by the ConfigMaps of their jobs) some days before it signs anything; the old one stays trusted
until it expires.  Where cert-manager keeps the Secret, its new authorities are taken over as they come.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
import ssl
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Self, cast

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from internlm_operator.kube import ApiError, Kube
from internlm_operator.objects import Object

AUTHORITY_DAYS = 3650
SERVER_DAYS = 90
# An authority's successor is made this long before its end,
SUCCESSOR_BEFORE = timedelta(days=90)
# and signs after this time: every worker's ConfigMap has it by then.
SUCCESSOR_TRUSTED = timedelta(days=2)
# A certificate that was made a little in the future, by another node's clock, would be refused.
CLOCK_SKEW = timedelta(hours=1)


_CERT_MANAGER = "cert-manager.io/certificate-name"

logger = logging.getLogger(__name__)


class SecretError(Exception):
    """The Secret with the authority cannot be used: a sentence that says what to do."""


@dataclass(frozen=True)
class KeyPair:
    """A certificate and its private key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey = field(compare=False)

    @property
    def certificate_pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        return self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )


@dataclass(frozen=True)
class Authorities:
    """Who signs, who will, and whom the workers trust."""

    current: KeyPair
    successor: KeyPair | None = None
    trusted: tuple[x509.Certificate, ...] = ()
    """Certificates of both and of earlier ones that have not expired, the newest first."""

    @property
    def bundle(self) -> str:
        return b"".join(c.public_bytes(serialization.Encoding.PEM) for c in self.trusted).decode()


def rotated(authorities: Authorities, now: datetime) -> Authorities:
    """What the authorities should be now; equal to `authorities` if nothing is due."""
    current, successor = authorities.current, authorities.successor
    end = current.certificate.not_valid_after_utc
    if successor is None and now > end - SUCCESSOR_BEFORE:
        successor = new_authority(now)
    if successor is not None:
        since = successor.certificate.not_valid_before_utc + CLOCK_SKEW
        if now >= end or now - since >= SUCCESSOR_TRUSTED:
            current, successor = successor, None
    found = [pair.certificate for pair in (successor, current, authorities.current) if pair]
    trusted = dict.fromkeys([*found, *authorities.trusted])
    return Authorities(current, successor, tuple(c for c in trusted if c.not_valid_after_utc > now))


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


class Certificates:
    """The channel's certificates as they are now, on disk in a Secret and at work in two TLS contexts."""

    def __init__(self, kube: Kube, namespace: str, name: str, names: list[str]) -> None:
        self._kube, self._namespace, self._name = kube, namespace, name
        self.names = names
        self.bundle = ""
        """PEM of the authorities that clients trust."""
        self.client: ssl.SSLContext
        """For calling another replica."""
        self.server: ssl.SSLContext
        """For serving; it stays the same object."""
        self._authorities: Authorities | None = None
        self._certificate: KeyPair | None = None

    @classmethod
    async def load(cls, kube: Kube, namespace: str, name: str, names: list[str]) -> Self:
        """Read the Secret, or make it.

        Raises SecretError where it is there and cannot be used, ApiError where the API server refuses.
        """
        certificates = cls(kube, namespace, name, names)
        certificates.server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        await certificates.refresh(datetime.now(UTC))
        return certificates

    async def keep(self, trust: Callable[[str], None], every_seconds: float) -> None:
        """Look after them until cancelled; `trust` gets every new bundle."""
        while True:
            await asyncio.sleep(every_seconds)
            bundle = self.bundle
            try:
                await self.refresh(datetime.now(UTC))
            except (ApiError, SecretError) as error:
                logger.warning("the channel's certificates are kept as they are: %s", error)
            if self.bundle != bundle:
                logger.info("the workers are told of a new certificate authority")
                trust(self.bundle)

    async def refresh(self, now: datetime) -> None:
        """Take over what the Secret says now, and do what is due at `now`."""
        authorities = await self._read_or_make(now)
        if self._authorities is not None:  # of one that cert-manager replaced, this process alone knows
            known = dict.fromkeys([*authorities.trusted, *self._authorities.trusted])
            trusted = tuple(c for c in known if c.not_valid_after_utc > now)
            authorities = replace(authorities, trusted=trusted)
        if authorities.bundle != self.bundle:
            self.client = ssl.create_default_context(cadata=authorities.bundle)
        renewed = self._certificate is None or _half_over(self._certificate.certificate, now)
        if self._authorities is None or renewed or authorities.current != self._authorities.current:
            self._certificate = new_server(authorities.current, self.names, now)
            load(self.server, self._certificate)
        self._authorities, self.bundle = authorities, authorities.bundle

    async def _read_or_make(self, now: datetime) -> Authorities:
        where = f"Secret {self._namespace}/{self._name}"
        while True:
            secret = await self._kube.get("Secret", self._namespace, self._name)
            # Of two operators that change it at the same moment, the one that comes second reads again.
            if secret is None:
                made = rotated(Authorities(new_authority(now)), now)
                if await self._kube.create(make_secret(self._namespace, self._name, made)) is not None:
                    return made
                continue
            found = read_secret(secret, where, now)
            if _CERT_MANAGER in (secret["metadata"].get("annotations") or {}):
                return found
            wanted = rotated(found, now)
            if wanted == found:
                return found
            try:
                await self._kube.replace(make_secret(self._namespace, self._name, wanted, secret))
                return wanted
            except ApiError as error:
                if error.code != 409:
                    raise


def _half_over(certificate: x509.Certificate, now: datetime) -> bool:
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return now > start + (end - start) / 2


def load(context: ssl.SSLContext, pair: KeyPair) -> None:
    """Use `pair` for new connections; Python loads certificates from files only."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "server.pem")
        file.touch(mode=0o600)
        file.write_bytes(pair.key_pem + pair.certificate_pem)
        context.load_cert_chain(file)


def make_secret(namespace: str, name: str, authorities: Authorities, old: Object | None = None) -> Object:
    """The Secret that holds the authorities; in the place of `old`, if given."""
    data = {
        "tls.crt": authorities.current.certificate_pem,
        "tls.key": authorities.current.key_pem,
        "ca.crt": authorities.bundle.encode(),
    }
    if authorities.successor is not None:
        data |= {
            "successor.crt": authorities.successor.certificate_pem,
            "successor.key": authorities.successor.key_pem,
        }
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "type": (old or {}).get("type", "kubernetes.io/tls"),
        "metadata": old["metadata"] if old else {"name": name, "namespace": namespace},
        "data": {key: base64.b64encode(value).decode() for key, value in data.items()},
    }


def read_secret(secret: Object, where: str, now: datetime) -> Authorities:
    """The authorities in `secret`; SecretError, beginning with `where`, for a Secret that cannot be used."""
    remedy = "delete it, and the operator makes a new one at its next start"
    data = secret.get("data") or {}
    try:
        pairs = [_read_pair(data, "tls")]
        if "successor.crt" in data:
            pairs.append(_read_pair(data, "successor"))
        bundle = base64.b64decode(data.get("ca.crt", ""))
        trusted = x509.load_pem_x509_certificates(bundle) if bundle.strip() else []
    except (KeyError, ValueError, TypeError, binascii.Error, x509.ExtensionNotFound) as error:
        raise SecretError(f"{where}: holds no certificate authority ({error}); {remedy}") from error
    for pair in pairs:
        if not isinstance(pair.key, ec.EllipticCurvePrivateKey):
            raise SecretError(f"{where}: its key is no elliptic curve key, such as ECDSA P-256; {remedy}")
        if pair.key.public_key() != pair.certificate.public_key():
            raise SecretError(f"{where}: the key does not belong to the certificate; {remedy}")
    known = dict.fromkeys([*(pair.certificate for pair in reversed(pairs)), *trusted])
    kept = tuple(c for c in known if c.not_valid_after_utc > now)
    return Authorities(pairs[0], pairs[1] if len(pairs) > 1 else None, kept)


def _read_pair(data: Object, name: str) -> KeyPair:
    certificate = x509.load_pem_x509_certificate(base64.b64decode(data[f"{name}.crt"]))
    key = serialization.load_pem_private_key(base64.b64decode(data[f"{name}.key"]), None)
    certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
    return KeyPair(certificate, cast(ec.EllipticCurvePrivateKey, key))


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
