"""Certificates in files: which are accepted, and which peers are trusted after a change."""

import asyncio
import logging
import threading
import time
from pathlib import Path

import pytest
import trustme

from tests.support.authority import Authority, Mounted, Named, Renamed
from tests.support.watching import until
from unlatch.common.errors import CertificateError
from unlatch.common.security import certificates as certificates_module
from unlatch.common.security import files
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
    given: Renamed, ours: Authority, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A certificate that is not valid yet is taken when it becomes valid, though its file changes no more."""
    certificates = loaded(given)
    before, ahead = certificates.now, 0.0
    monkeypatch.setattr(certificates_module, "time", lambda: time.time() + ahead)
    caplog.set_level(logging.WARNING)
    early = ours.issue("server.example", after=60.0)
    given.swap(early)
    for _ in range(2):
        assert not await certificates._refresh()
    assert certificates.now is before
    ahead = 120.0
    assert await certificates._refresh()
    assert certificates.now.cert == early["tls.crt"] != before.cert
    assert all("is not valid before" in record.message for record in caplog.records)
    assert caplog.records


async def test_what_seemed_expired_is_taken_when_the_clock_is_set_back(
    given: Renamed, ours: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A certificate that had expired by a wrong clock is taken when the clock is right, though its file is the same."""
    certificates = loaded(given)
    seen = ours.issue("server.example", seconds=-1.0)
    given.swap(seen)
    for _ in range(2):
        assert not await certificates._refresh()
    monkeypatch.setattr(certificates_module, "time", lambda: time.time() - 60)
    assert await certificates._refresh()
    assert certificates.now.cert == seen["tls.crt"]
    assert not await certificates._refresh()


async def test_change_while_files_are_read_for_the_first_time_is_seen(
    given: Renamed, ours: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files that change while the last of them is read for the first time are read again."""
    first, second = ours.issue("server.example"), ours.issue("server.example")
    given.swap(first)
    changes = [second]

    def content(path: str, most_bytes: int) -> bytes:
        if path == given["ca.crt"] and changes:
            given.swap(changes.pop())
        return files.content(path, most_bytes)

    monkeypatch.setattr(certificates_module, "content", content)
    certificates = loaded(given)
    assert not changes
    assert certificates.now.cert == first["tls.crt"]
    assert await certificates._refresh()
    assert certificates.now.cert == second["tls.crt"]


async def test_peers_are_looked_at_while_a_file_system_hangs(
    given: Renamed, ours: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A peer whose certificate expires meanwhile is found. New certificates are taken when they have been read."""
    certificates, looks, taken, hangs = loaded(given), list[bool](), list[bool](), threading.Event()

    def content(path: str, most_bytes: int) -> bytes:
        assert hangs.wait(60.0)
        return files.content(path, most_bytes)

    monkeypatch.setattr(certificates_module, "content", content)
    monkeypatch.setattr(certificates_module, "LOOK_SECONDS", 0.01)
    given.swap(second := ours.issue("server.example"))
    watching = asyncio.create_task(certificates.watch(lambda: looks.append(True), lambda: taken.append(True)))
    await until(lambda: len(looks) > 2, "peers are looked at")
    assert not taken
    hangs.set()
    await until(lambda: taken, "they are taken")
    assert certificates.now.cert == second["tls.crt"]
    watching.cancel()


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
