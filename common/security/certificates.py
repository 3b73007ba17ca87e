"""Certificates as files hold them: read and checked at the start, and again whenever they change.

    every second: did a file change? ──> read and checked, on a thread ──> taken
                                                     ├── not valid yet: the same again when they are
                                                     └── not fit for use: the old ones stay, the log says why

Kubernetes swaps the directory that holds them in one step, others write one file after the other. So a certificate and
a key that do not belong together are no error later than the start: one of them is still to come.
"""

import asyncio
import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from time import time
from typing import Never

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from cryptography.x509 import Certificate, load_pem_x509_certificate, load_pem_x509_certificates

from unlatch.common.errors import CertificateError
from unlatch.common.security.files import LOOK_SECONDS, State, content, state

# Not structlog: clients come here too, and what they log is for the program that they are part of to say.
_log = logging.getLogger(__name__)

# A file that is larger is no certificate; a bundle of every public authority takes a quarter of a mebibyte.
_MOST_FILE_BYTES = 4 * 1024 * 1024
# Of peers that were looked at, and of authorities that are trusted no more.
_MOST_REMEMBERED = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """What one end shows and whom it trusts, and what those who gave the paths call them. An empty path is none."""

    cert: str = ""
    key: str = ""
    ca: str = ""
    names: tuple[str, str, str]

    @property
    def paths(self) -> dict[str, str]:
        """The files that there are, by name."""
        given = zip(self.names, (self.cert, self.key, self.ca), strict=True)
        return {name: path for name, path in given if path}


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What the files held when they were last fit for use. A key is shown nowhere."""

    cert: bytes
    key: bytes = field(repr=False)
    ca: bytes
    authorities: tuple[Certificate, ...]
    # By name and path, in seconds since the epoch: the first of a file's certificates to expire.
    expiries: Mapping[tuple[str, str], float]


class NotValidYet(CertificateError):
    """A certificate that will be fit for use: when, in seconds since the epoch, `valid_from` says."""

    valid_from = math.inf


# Files as they were at one time.
_States = tuple[State | None, ...]


class Certificates:
    """One end's certificates, as they are now. `seen` is how the files were before they were read."""

    def __init__(self, files: Files, contents: Contents, seen: _States) -> None:
        self.files = files
        self.now = contents
        # Authorities that were trusted once and are not any more, by their subject and key.
        self._removed: OrderedDict[bytes, Certificate] = OrderedDict()
        self._peers: OrderedDict[bytes, _Peer] = OrderedDict()
        self._seen = seen
        # When what the files hold is fit for use, where it was too early for it.
        self._valid_from = math.inf
        self._changed = asyncio.Event()

    async def changed(self) -> None:
        """Wait until others have been taken."""
        await self._changed.wait()

    async def watch(self, looked: Callable[[], None] = lambda: None, taken: Callable[[], None] = lambda: None) -> Never:
        """Keep them up to date, for ever. `looked` is called every second, `taken` when others have been taken."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            if await self._refresh():
                taken()
            looked()

    async def _refresh(self) -> bool:
        """Take what the files hold if they have changed, or have become valid, and are fit for use."""
        states = _states(self.files)
        if states == self._seen and time() < self._valid_from:
            return False
        # Noted before they are read: what changes meanwhile is seen the next time.
        self._seen, self._valid_from = states, math.inf
        try:
            contents = await asyncio.to_thread(_read, self.files)
        except CertificateError as error:
            if isinstance(error, NotValidYet):
                self._valid_from = error.valid_from
            _log.warning("certificates are not taken, the old ones stay: %s", error)
            return False
        self._take(contents)
        _log.info("certificates taken: %s", ", ".join(f"{name} {path}" for name, path in self.files.paths.items()))
        return True

    def refusal(self, certificate: bytes) -> str:
        """Why a peer whose certificate was right when it came is to be believed no more; empty while it is."""
        peer = self._peers.get(certificate)
        if peer is None:
            try:
                peer = _Peer(load_pem_x509_certificate(certificate), self._removed.values())
            except ValueError as error:
                return f"your certificate cannot be read: {error}"
            self._peers[certificate] = peer
            if len(self._peers) > _MOST_REMEMBERED:
                self._peers.popitem(last=False)
        if not peer.vouched_for:
            return "who issued your certificate is trusted no more: open another connection with another certificate"
        return "your certificate has expired" if time() >= peer.expires else ""

    def _take(self, contents: Contents) -> None:
        trusted = {_identity(authority) for authority in contents.authorities}
        for authority in self.now.authorities:
            self._removed[_identity(authority)] = authority
        for identity in trusted & self._removed.keys():
            del self._removed[identity]
        while len(self._removed) > _MOST_REMEMBERED:
            self._removed.popitem(last=False)
        self._peers.clear()
        self.now = contents
        self._changed.set()
        self._changed = asyncio.Event()


class _Peer:
    """What is remembered of a peer's certificate."""

    __slots__ = ("expires", "vouched_for")

    def __init__(self, certificate: Certificate, removed: Iterable[Certificate]) -> None:
        self.expires = _expiry(certificate)
        self.vouched_for = not any(_issued(certificate, authority) for authority in removed)


def load(files: Files) -> Certificates:
    """The certificates of these files. Raises CertificateError."""
    # What changes while they are read is seen at the first look.
    seen = _states(files)
    return Certificates(files, _read(files), seen)


def _states(files: Files) -> _States:
    return tuple(map(state, files.paths.values()))


def _read(files: Files) -> Contents:
    cert_name, key_name, ca_name = files.names
    cert, chain = _certificates(cert_name, files.cert)
    key = _key(key_name, files.key, chain[0], f"{cert_name} {files.cert}") if files.key else b""
    ca, authorities = _certificates(ca_name, files.ca)
    if chain:
        _check_dates(cert_name, files.cert, chain[0])
    if authorities and all(_expiry(authority) <= time() for authority in authorities):
        _check_dates(ca_name, files.ca, authorities[0])
    expiries = {
        (name, path): min(map(_expiry, found))
        for name, path, found in ((cert_name, files.cert, chain), (ca_name, files.ca, authorities))
        if found
    }
    return Contents(cert=cert, key=key, ca=ca, authorities=authorities, expiries=expiries)


def _certificates(name: str, path: str) -> tuple[bytes, tuple[Certificate, ...]]:
    if not path:
        return b"", ()
    pem = _pem(name, path)
    try:
        found = tuple(load_pem_x509_certificates(pem))
        # Looked at here, where it can still be said which file is wrong.
        for certificate in found:
            certificate.public_key()
        return pem, found
    except (ValueError, UnsupportedAlgorithm) as error:
        raise _wrong(name, path, f"it holds no certificates in PEM ({error})") from None


def _key(name: str, path: str, certificate: Certificate, certificate_named: str) -> bytes:
    pem = _pem(name, path)
    try:
        public = load_pem_private_key(pem, None).public_key()
    except TypeError:
        raise _wrong(name, path, "the key is encrypted, and nobody here knows its password") from None
    except (ValueError, UnsupportedAlgorithm):
        # What was found in a file that may hold a key is told to nobody.
        raise _wrong(name, path, "it holds no private key in PEM that can be read") from None
    form = Encoding.DER, PublicFormat.SubjectPublicKeyInfo
    if public.public_bytes(*form) != certificate.public_key().public_bytes(*form):
        raise _wrong(name, path, f"the key does not belong to {certificate_named}")
    return pem


def _pem(name: str, path: str) -> bytes:
    try:
        return content(path, _MOST_FILE_BYTES)
    except (OSError, ValueError) as error:
        raise _wrong(name, path, getattr(error, "strerror", None) or str(error)) from None


def _check_dates(name: str, path: str, certificate: Certificate) -> None:
    now, begins, ends = datetime.now(UTC), certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now >= ends:
        raise _wrong(name, path, f"the certificate expired at {ends:%Y-%m-%d %H:%M:%S} UTC")
    if now < begins:
        early = NotValidYet(_told(name, path, f"the certificate does not hold before {begins:%Y-%m-%d %H:%M:%S} UTC"))
        early.valid_from = begins.timestamp()
        raise early


def _wrong(name: str, path: str, what: str) -> CertificateError:
    return CertificateError(_told(name, path, what))


def _told(name: str, path: str, what: str) -> str:
    return f"{name} {path}: {what}"


def _expiry(certificate: Certificate) -> float:
    return certificate.not_valid_after_utc.timestamp()


def _identity(authority: Certificate) -> bytes:
    """Whom it stands for: one that is issued anew, for the same key, is the same authority."""
    key = authority.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return authority.subject.public_bytes() + key


def _issued(certificate: Certificate, authority: Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True
