"""Certificates in files: which are accepted, and which peers are trusted after a change."""

import asyncio
import logging
import os
from pathlib import Path

import pytest
import trustme

from tests.support.authority import Authority, Mounted, Named, Renamed
from unlatch.common.errors import CertificateError
from unlatch.common.security.certificates import Certificates, Files, load

NAMES = ("--tls-cert", "--tls-key", "--tls-client-ca")


def loaded(given: Renamed) -> Certificates:
    return load(Files(cert=given["tls.crt"], key=given["tls.key"], ca=given["ca.crt"], names=NAMES))


async def swapped(certificates: Certificates, given: Renamed, files: Named) -> None:
    """Swap files, and wait until their contents have been taken."""
    watching = asyncio.create_task(certificates.watch())
    changed = asyncio.create_task(certificates.changed())
    await asyncio.sleep(0)
    given.swap(files)
    await asyncio.wait_for(changed, 10)
    watching.cancel()


@pytest.fixture
def ours() -> Authority:
    return Authority()


@pytest.fixture
def given(tmp_path: Path, ours: Authority) -> Renamed:
    return Mounted(tmp_path / "files", {**ours.issue("server.example"), "ca.crt": ours.pem})


async def test_a_peer_is_believed_while_its_issuer_is_trusted(given: Renamed, ours: Authority) -> None:
    """A peer stays trusted after another authority is added, and is trusted again when its own authority is back."""
    certificates, other = loaded(given), Authority()
    peer = ours.issue("peer.example")["tls.crt"]
    for bundle, believed in ((ours.pem + other.pem, True), (other.pem, False), (other.pem + ours.pem, True)):
        await swapped(certificates, given, {"ca.crt": bundle})
        assert (certificates.refusal(peer) == "") is believed
        assert certificates.refusal(other.issue("other.example")["tls.crt"]) == ""


async def test_a_peer_of_an_authority_between_is_left_to_its_next_handshake(given: Renamed, ours: Authority) -> None:
    """A peer of an intermediate authority, whose issuer is unknown here, is not refused before its next handshake."""
    certificates = loaded(given)
    chain = ours.issue("peer.example", through=True)["tls.crt"]
    await swapped(certificates, given, {"ca.crt": Authority().pem})
    assert certificates.refusal(chain) == ""


def test_a_peer_is_believed_until_its_certificate_expires(given: Renamed, ours: Authority) -> None:
    """A peer is trusted until its certificate expires by the clock, whatever was found when it connected."""
    certificates = loaded(given)
    assert certificates.refusal(ours.issue("peer.example")["tls.crt"]) == ""
    assert "expired" in certificates.refusal(ours.issue("peer.example", seconds=-1.0)["tls.crt"])
    assert "cannot be read" in certificates.refusal(b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")


def test_what_is_remembered_of_peers_is_bounded(given: Renamed) -> None:
    """The memory of peers has a bound, however many come."""
    certificates = loaded(given)
    authority = trustme.CA()
    peers = [authority.issue_cert(f"{number}.example").cert_chain_pems[0].bytes() for number in range(40)]
    for number in range(2000):
        certificates.refusal(peers[number % 40] + b"\n" * (number // 40))
    assert len(certificates._peers) == 1024


async def test_what_is_not_fit_for_use_is_not_taken(
    given: Renamed, ours: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    """Unusable files are not taken: the old certificates stay, and the log says why once. Mended files are taken."""
    certificates = loaded(given)
    before = certificates.now
    caplog.set_level(logging.WARNING)
    for wrong in (
        {"tls.key": Authority().issue("server.example")["tls.key"]},
        dict(ours.issue("server.example", seconds=-1.0)),
        {"ca.crt": b"nothing"},
    ):
        given.swap(wrong)
        for _ in range(2):
            assert not await certificates._refresh()
        assert certificates.now is before
    assert len(caplog.records) == 3
    await swapped(certificates, given, {**ours.issue("server.example"), "ca.crt": ours.pem})
    assert certificates.now is not before


async def test_what_is_not_valid_yet_is_taken_when_it_is(
    given: Renamed, ours: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    """A certificate that is not valid yet is taken when it becomes valid, though its file changes no more."""
    certificates = loaded(given)
    before = certificates.now
    caplog.set_level(logging.WARNING)
    early = ours.issue("server.example", after=3.0)
    await swapped(certificates, given, early)
    assert certificates.now.cert == early["tls.crt"] != before.cert
    assert all("is not valid before" in record.message for record in caplog.records)
    assert caplog.records


async def test_change_while_files_are_read_for_the_first_time_is_seen(tmp_path: Path, ours: Authority) -> None:
    """A file that changes while another, here a pipe, is read for the first time is read again."""
    first, second = ours.issue("server.example"), ours.issue("server.example")
    given, bundle = Renamed(tmp_path / "files", first), tmp_path / "ca.crt"
    os.mkfifo(bundle)

    def load_them() -> Certificates:
        return load(Files(cert=given["tls.crt"], key=given["tls.key"], ca=str(bundle), names=NAMES))

    loading = asyncio.create_task(asyncio.to_thread(load_them))
    with await asyncio.to_thread(bundle.open, "wb") as written:
        given.swap(second)
        written.write(ours.pem)
    certificates = await loading
    assert certificates.now.cert == first["tls.crt"]
    writing = asyncio.create_task(asyncio.to_thread(bundle.write_bytes, ours.pem))
    taken = await certificates._refresh()
    # Where the pipe was not read, the writer would wait for ever.
    reading = os.open(bundle, os.O_RDONLY | os.O_NONBLOCK)
    await writing
    os.close(reading)
    assert taken
    assert certificates.now.cert == second["tls.crt"]


def test_keys_are_shown_nowhere(given: Renamed, tmp_path: Path) -> None:
    """Keys appear neither where certificates are printed whole nor in messages about wrong files."""
    key = Path(given["tls.key"]).read_text().splitlines()
    assert not any(line in repr(loaded(given).now) for line in key)
    spoilt = Renamed(tmp_path / "spoilt", {"tls.key": "\n".join([*key[:2], *key[3:]]).encode()})
    with pytest.raises(CertificateError) as refused:
        load(Files(cert=given["tls.crt"], key=spoilt["tls.key"], names=NAMES))
    assert not any(line in str(refused.value) for line in key[:-1])


def test_an_encrypted_key_is_named(given: Renamed, tmp_path: Path) -> None:
    """An encrypted key is named in the error, and no password is asked for."""
    from cryptography.hazmat.primitives import serialization as form

    key = form.load_pem_private_key(Path(given["tls.key"]).read_bytes(), None)
    kind = form.PrivateFormat.PKCS8, form.BestAvailableEncryption(b"secret")
    locked = Renamed(tmp_path / "locked", {"tls.key": key.private_bytes(form.Encoding.PEM, *kind)})
    with pytest.raises(CertificateError, match="the key is encrypted"):
        load(Files(cert=given["tls.crt"], key=locked["tls.key"], names=NAMES))
