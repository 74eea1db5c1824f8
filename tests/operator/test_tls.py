"""The job channel's certificates."""

from __future__ import annotations

import base64
import socket
import ssl
import threading
from datetime import UTC, datetime, timedelta

import pytest

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


@pytest.mark.parametrize("name", NAMES)
def test_a_pod_trusts_the_server_under_every_name_of_its_service(name: str) -> None:
    authority = tls.new_authority(NOW)
    assert greet(tls.server_context(tls.new_server(authority, NAMES, NOW)), authority, name)


def test_another_name_another_authority_and_an_expired_certificate_are_refused() -> None:
    authority, other = tls.new_authority(NOW), tls.new_authority(NOW)
    server = tls.server_context(tls.new_server(authority, NAMES, NOW))
    expired = tls.server_context(tls.new_server(authority, NAMES, NOW - timedelta(days=400)))
    for context, trusted, name in (
        (server, authority, "other.system.svc"),
        (server, other, NAMES[0]),
        (expired, authority, NAMES[0]),
    ):
        with pytest.raises(ssl.SSLCertVerificationError):
            greet(context, trusted, name)


def test_a_new_certificate_serves_new_connections_without_a_restart() -> None:
    authority = tls.new_authority(NOW)
    context = tls.server_context(tls.new_server(authority, NAMES, NOW))
    first = greet(context, authority, NAMES[0])
    tls.load(context, tls.new_server(authority, NAMES, NOW))
    assert greet(context, authority, NAMES[0]) != first


def test_the_authority_survives_its_secret() -> None:
    authority = tls.new_authority(NOW)
    again = tls.read_secret(tls.make_secret("system", "s", authority), "Secret system/s")
    assert again.certificate_pem == authority.certificate_pem
    assert again.key_pem == authority.key_pem


def test_a_secret_that_cannot_be_used_is_refused_with_what_to_do() -> None:
    good = tls.make_secret("system", "s", tls.new_authority(NOW))["data"]
    other = tls.make_secret("system", "s", tls.new_authority(NOW))["data"]
    old = tls.make_secret("system", "s", tls.new_authority(NOW - timedelta(days=tls.AUTHORITY_DAYS - 3)))[
        "data"
    ]
    for data in (
        {},
        good | {"tls.key": other["tls.key"]},
        good | {"tls.crt": "?"},
        good | {"tls.crt": base64.b64encode(b"no certificate").decode()},
        old,
    ):
        with pytest.raises(
            tls.SecretError, match=r"^Secret system/s: .*; delete it, and the operator makes a new one"
        ):
            tls.read_secret({"data": data}, "Secret system/s")
