"""The job channel's certificates."""

from __future__ import annotations

import base64
import socket
import ssl
import threading
from datetime import UTC, datetime, timedelta

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from internlm_operator import tls

NOW = datetime.now(UTC)
NAMES = tls.service_names("internlm-operator", "system")


def greet(server: ssl.SSLContext, authority: tls.KeyPair, name: str) -> str:
    """Connect as a pod does, trusting the authority only; returns the server certificate's serial number."""
    client = ssl.create_default_context(cadata=authority.certificate_pem.decode())
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    ours, theirs = socket.socketpair()

    def answer() -> None:
        try:
            server.wrap_socket(theirs, server_side=True).close()
        except OSError:
            theirs.close()

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        with client.wrap_socket(ours, server_hostname=name) as connection:
            certificate = connection.getpeercert()
            assert certificate is not None
            return str(certificate["serialNumber"])
    finally:
        ours.close()
        thread.join()


def server_context(pair: tls.KeyPair) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load(context, pair)
    return context


@pytest.mark.parametrize("name", NAMES)
def test_a_pod_trusts_the_server_under_every_name_of_its_service(name: str) -> None:
    authority = tls.new_authority(NOW)
    assert greet(server_context(tls.new_server(authority, NAMES, NOW)), authority, name)


def test_another_name_another_authority_and_an_expired_certificate_are_refused() -> None:
    authority, other = tls.new_authority(NOW), tls.new_authority(NOW)
    server = server_context(tls.new_server(authority, NAMES, NOW))
    expired = server_context(tls.new_server(authority, NAMES, NOW - timedelta(days=400)))
    for context, trusted, name in (
        (server, authority, "other.system.svc"),
        (server, other, NAMES[0]),
        (expired, authority, NAMES[0]),
    ):
        with pytest.raises(ssl.SSLCertVerificationError):
            greet(context, trusted, name)


def test_a_new_certificate_serves_new_connections_without_a_restart() -> None:
    authority = tls.new_authority(NOW)
    context = server_context(tls.new_server(authority, NAMES, NOW))
    first = greet(context, authority, NAMES[0])
    tls.load(context, tls.new_server(authority, NAMES, NOW))
    assert greet(context, authority, NAMES[0]) != first


def trusting(current: tls.KeyPair, now: datetime = NOW) -> tls.Authorities:
    return tls.rotated(tls.Authorities(current), now)


@pytest.mark.parametrize("age", [0, tls.AUTHORITY_DAYS - 30])
def test_the_authorities_survive_their_secret(age: int) -> None:
    authorities = trusting(tls.new_authority(NOW - timedelta(days=age)))
    assert (authorities.successor is not None) == bool(age)
    again = tls.read_secret(tls.make_secret("system", "s", authorities), "Secret system/s", NOW)
    assert again == authorities
    assert again.current.key_pem == authorities.current.key_pem
    assert tls.rotated(again, NOW) == again


def test_a_successor_is_trusted_before_it_signs_and_the_old_authority_until_it_expires() -> None:
    """Day by day, through Secrets: a worker whose bundle is two days old trusts the server at any time."""
    start = NOW - timedelta(days=tls.AUTHORITY_DAYS - 100)
    authorities = trusting(tls.new_authority(start))
    signers, bundles = [authorities.current.certificate], [authorities.trusted]
    for day in range(110):
        now = NOW + timedelta(days=day)
        secret = tls.make_secret("system", "s", tls.rotated(authorities, now))
        authorities = tls.read_secret(secret, "Secret system/s", now)
        signer = authorities.current.certificate
        assert signer in bundles[-1], day
        assert now < signer.not_valid_after_utc, day
        assert all(certificate.not_valid_after_utc > now for certificate in authorities.trusted)
        signers.append(signer)
        bundles.append(authorities.trusted)
    assert len(set(signers)) == 2
    assert max(map(len, bundles)) == 2
    assert len(bundles[-1]) == 1


def test_an_authority_that_expired_while_no_operator_ran_is_replaced_at_once() -> None:
    old = tls.new_authority(NOW - timedelta(days=tls.AUTHORITY_DAYS + 1))
    new = trusting(old)
    assert new.current != old
    assert new.successor is None
    assert new.trusted == (new.current.certificate,)


def test_a_secret_that_cannot_be_used_is_refused_with_what_to_do() -> None:
    good = tls.make_secret("system", "s", trusting(tls.new_authority(NOW)))["data"]
    other = tls.make_secret("system", "s", trusting(tls.new_authority(NOW)))["data"]
    key = rsa.generate_private_key(65537, 2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    for data in (
        {},
        good | {"tls.key": other["tls.key"]},
        good | {"tls.key": base64.b64encode(key).decode()},
        good | {"tls.crt": "?"},
        good | {"tls.crt": base64.b64encode(b"no certificate").decode()},
        good | {"successor.crt": other["tls.crt"]},
    ):
        with pytest.raises(
            tls.SecretError, match=r"^Secret system/s: .*; delete it, and the operator makes a new one"
        ):
            tls.read_secret({"data": data}, "Secret system/s", NOW)
