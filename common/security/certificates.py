"""Certificates in files, read and checked at the start, and again whenever the files change.

    every second: did a file change? ──> read and checked, on a thread ──> used from now on
                                                     ├── not valid now: tried again when they are
                                                     └── invalid: the old ones stay, the log has the reason

Kubernetes replaces the directory that holds them in one step, but other tools write one file after the other. So after
the start a certificate and a key that do not match are no error: the other file is still to come.
"""

import asyncio
import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from time import time
from typing import Never

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from cryptography.x509 import Certificate, load_pem_x509_certificate, load_pem_x509_certificates

from unlatch.common.errors import CertificateError
from unlatch.common.security.files import LOOK_SECONDS, FileWatch, content, read_apart

# Not structlog: clients use this module too, and their program configures logging.
_log = logging.getLogger(__name__)

# A larger file is no certificate; a bundle of all public authorities takes a quarter of a mebibyte.
_MAX_FILE_BYTES = 4 * 1024 * 1024
# Bound of remembered peers, and of remembered authorities that are no longer trusted.
_MAX_REMEMBERED = 1024
_DATE = "%Y-%m-%d %H:%M:%S"


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """Paths of one end's certificate, key and trusted authorities, with their settings' names. "" is no file."""

    cert: str = ""
    key: str = ""
    ca: str = ""
    names: tuple[str, str, str]

    @property
    def paths(self) -> dict[str, str]:
        """Paths of the given files, by setting name."""
        given = zip(self.names, (self.cert, self.key, self.ca), strict=True)
        return {name: path for name, path in given if path}


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """Contents of the files when they were last valid. The key is left out of the repr."""

    cert: bytes
    key: bytes = field(repr=False)
    ca: bytes
    authorities: tuple[Certificate, ...]
    # Keyed by setting name and path: when the first of the file's certificates expires, in seconds since the epoch.
    expiries: Mapping[tuple[str, str], float]


class NotValidNow(CertificateError):
    """A certificate that is not valid yet, or has expired. The dates are in seconds since the epoch."""

    def __init__(self, message: str, begins: float, ends: float) -> None:
        super().__init__(message)
        self.begins, self.ends = begins, ends


class Certificates:
    """The present certificates of one end. `watch` has the files' state from before they were read."""

    def __init__(self, files: Files, contents: Contents, watch: FileWatch) -> None:
        self.files = files
        self.now = contents
        # Authorities that were trusted once but no longer are, by subject and key.
        self._removed: OrderedDict[bytes, Certificate] = OrderedDict()
        self._peers: OrderedDict[bytes, _Peer] = OrderedDict()
        self._watch = watch
        # From when and until when the files' contents are valid, if they were not when they were read. The clock may be
        # set, so an expired certificate may become valid, too.
        self._valid = (math.inf, math.inf)
        self._changed = asyncio.Event()

    async def changed(self) -> None:
        """Wait until new certificates are in use."""
        await self._changed.wait()

    async def watch(self, looked: Callable[[], None] = lambda: None, taken: Callable[[], None] = lambda: None) -> Never:
        """Keep certificates up to date, for ever. Calls `looked` every second, and `taken` after each change."""
        refresh: asyncio.Task[bool] | None = None
        try:
            while True:
                await asyncio.sleep(LOOK_SECONDS)
                refresh = refresh or asyncio.create_task(self._refresh())
                # Peers are looked at, too, while a file system hangs.
                await asyncio.wait((refresh,), timeout=LOOK_SECONDS)
                if refresh.done():
                    if refresh.result():
                        taken()
                    refresh = None
                looked()
        finally:
            if refresh is not None:
                refresh.cancel()

    async def _refresh(self) -> bool:
        """Read the files again if they have changed or become valid. Returns whether new certificates are in use."""
        begins, ends = self._valid
        paths = self.files.paths
        try:
            contents = await read_apart(", ".join(paths.values()), partial(self._changed_contents, begins, ends))
        except CertificateError as error:
            self._valid = (error.begins, error.ends) if isinstance(error, NotValidNow) else (math.inf, math.inf)
            _log.warning("certificates not replaced, old ones stay in use: %s", error)
            return False
        if contents is None:
            return False
        self._valid = (math.inf, math.inf)
        self._take(contents)
        _log.info("certificates replaced: %s", ", ".join(f"{name} {path}" for name, path in paths.items()))
        return True

    def _changed_contents(self, begins: float, ends: float) -> Contents | None:
        """The contents of the files if they have changed, or have become valid at `begins` and are until `ends`."""
        return _read(self.files) if self._watch.has_changed() or begins <= time() < ends else None

    def refusal(self, certificate: bytes) -> str:
        """Why a peer whose certificate was once accepted is now refused; "" if it is not."""
        peer = self._peers.get(certificate)
        if peer is None:
            try:
                peer = _Peer(load_pem_x509_certificate(certificate), self._removed.values())
            except ValueError as error:
                return f"your certificate cannot be read: {error}"
            self._peers[certificate] = peer
            if len(self._peers) > _MAX_REMEMBERED:
                self._peers.popitem(last=False)
        if not peer.vouched_for:
            return "your certificate's issuer is no longer trusted: open a new connection with another certificate"
        return "your certificate has expired" if time() >= peer.expires else ""

    def _take(self, contents: Contents) -> None:
        trusted = {_identity(authority) for authority in contents.authorities}
        for authority in self.now.authorities:
            self._removed[_identity(authority)] = authority
        for identity in trusted & self._removed.keys():
            del self._removed[identity]
        while len(self._removed) > _MAX_REMEMBERED:
            self._removed.popitem(last=False)
        self._peers.clear()
        self.now = contents
        self._changed.set()
        self._changed = asyncio.Event()


class _Peer:
    """Facts about a peer's certificate."""

    __slots__ = ("expires", "vouched_for")

    def __init__(self, certificate: Certificate, removed: Iterable[Certificate]) -> None:
        self.expires = _expiry(certificate)
        self.vouched_for = not any(_issued(certificate, authority) for authority in removed)


def load(files: Files) -> Certificates:
    """Read certificates from files. Raises CertificateError."""
    watch = FileWatch(*files.paths.values())
    # Before the read, so that a change during it is seen by the first look.
    watch.has_changed()
    return Certificates(files, _read(files), watch)


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
        # Parsed here, where the error can still name the file.
        for certificate in found:
            certificate.public_key()
        return pem, found
    except (ValueError, UnsupportedAlgorithm) as error:
        raise _wrong(name, path, f"wanted certificates in PEM ({error})") from None


def _key(name: str, path: str, certificate: Certificate, certificate_named: str) -> bytes:
    pem = _pem(name, path)
    try:
        public = load_pem_private_key(pem, None).public_key()
    except TypeError:
        raise _wrong(name, path, "the key is encrypted; wanted a key without a password") from None
    except (ValueError, UnsupportedAlgorithm):
        # The error must not quote the file, which may hold a key.
        raise _wrong(name, path, "wanted a readable private key in PEM") from None
    form = Encoding.DER, PublicFormat.SubjectPublicKeyInfo
    if public.public_bytes(*form) != certificate.public_key().public_bytes(*form):
        raise _wrong(name, path, f"the key does not match {certificate_named}")
    return pem


def _pem(name: str, path: str) -> bytes:
    try:
        return content(path, _MAX_FILE_BYTES)
    except (OSError, ValueError) as error:
        raise _wrong(name, path, getattr(error, "strerror", None) or str(error)) from None


def _check_dates(name: str, path: str, certificate: Certificate) -> None:
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if begins.timestamp() <= time() < ends.timestamp():
        return
    expired = time() >= ends.timestamp()
    what = f"expired at {ends:{_DATE}}" if expired else f"is not valid before {begins:{_DATE}}"
    raise NotValidNow(f"{name} {path}: the certificate {what} UTC", begins.timestamp(), ends.timestamp())


def _wrong(name: str, path: str, what: str) -> CertificateError:
    return CertificateError(f"{name} {path}: {what}")


def _expiry(certificate: Certificate) -> float:
    return certificate.not_valid_after_utc.timestamp()


def _identity(authority: Certificate) -> bytes:
    """The identity of an authority. A certificate reissued for the same key is the same authority."""
    key = authority.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return authority.subject.public_bytes() + key


def _issued(certificate: Certificate, authority: Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True
