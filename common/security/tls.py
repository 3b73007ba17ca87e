"""TLS as gRPC speaks it, both ends: a server's credentials, a channel's, and peers of connections that outlive them.

A server asks for its certificates anew with each handshake. What was shaken hands on before keeps going: lanes are
asked to open anew (common/lane/server.py), other connections end by their age, and a peer whose certificate is trusted
no more is refused on each, whatever comes (docs/decisions/0015).
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
import grpc.aio

from unlatch.common.errors import Unauthenticated
from unlatch.common.lane.caller import LaneCaller
from unlatch.common.net.addresses import is_unix
from unlatch.common.net.settings import Settings
from unlatch.common.telemetry.recorder import Recorder

if TYPE_CHECKING:
    # Who speaks no TLS does without it, which takes 50 ms to load.
    from unlatch.common.security.certificates import Certificates

Answer = TypeVar("Answer")
Method = Callable[[Any, Any], Awaitable[Answer]]


def load(cert: str, key: str, ca: str, *, names: tuple[str, str, str]) -> "Certificates":
    """One end's certificates from files, and what those who gave the paths call them. Raises CertificateError."""
    from unlatch.common.security.certificates import Files, load

    return load(Files(cert=cert, key=key, ca=ca, names=names))


def server_certificates(settings: Settings) -> "Certificates | None":
    """What a service shows to its callers, if it speaks TLS. Raises CertificateError."""
    if not settings.tls_cert or is_unix(settings.listen):
        return None
    names = ("--tls-cert", "--tls-key", "--tls-client-ca")
    return load(settings.tls_cert, settings.tls_key, settings.tls_client_ca, names=names)


def server_credentials(certificates: "Certificates") -> grpc.ServerCredentials:
    """A server's credentials, which are as the files are at each handshake."""
    given = certificates.now

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        # Called on gRPC's threads; None means that nothing has changed.
        nonlocal given
        if certificates.now is given:
            return None
        given = certificates.now
        return _configuration(certificates)

    return grpc.dynamic_ssl_server_credentials(
        _configuration(certificates),
        fetch,  # type: ignore[arg-type]  # its stub does not know that None is an answer
        require_client_authentication=bool(given.ca),
    )


def _configuration(certificates: "Certificates") -> grpc.ServerCertificateConfiguration:
    now = certificates.now
    return grpc.ssl_server_certificate_configuration([(now.key, now.cert)], now.ca or None)


class ChannelSecurity:
    """How channels to servers are secured: by these certificates, or not at all.

    Where a server's address is no part of its certificate, `name` is what the certificate must say.
    """

    def __init__(self, certificates: "Certificates | None" = None, name: str = "") -> None:
        self._certificates = certificates
        self._name = name

    def open_channel(self, target: str, options: Sequence[tuple[str, Any]]) -> grpc.aio.Channel:
        """A channel on connections of its own, which no other channel's handshake has opened."""
        if self._certificates is None or is_unix(target):
            return grpc.aio.insecure_channel(target, options=options)
        now = self._certificates.now
        credentials = grpc.ssl_channel_credentials(now.ca or None, now.key or None, now.cert or None)
        own: list[tuple[str, Any]] = [("grpc.use_local_subchannel_pool", 1)]
        if self._name:
            own.append(("grpc.ssl_target_name_override", self._name))
        return grpc.aio.secure_channel(target, credentials, options=[*options, *own])

    async def until_another_is_wanted(self, lane: LaneCaller, carrying: "asyncio.Task[None]") -> None:
        """Wait until a lane has ended, or either end's certificates have changed, so that another takes its place."""
        wishes: list[asyncio.Task[Any]] = [asyncio.create_task(lane.reopen_asked.wait())]
        if self._certificates is not None:
            wishes.append(asyncio.create_task(self._certificates.changed()))
        try:
            await asyncio.wait((carrying, *wishes), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wish in wishes:
                wish.cancel()


def report(recorder: Recorder, *ends: "Certificates | None") -> None:
    """Have a process's metrics tell when its certificates expire."""
    recorder.gauge(
        "unlatch_certificate_expiry_timestamp_seconds",
        "When the first of a file's certificates expires, since the epoch.",
        ("role", "file"),
        lambda: {
            (name.removeprefix("--"), path): expiry
            for certificates in ends
            if certificates is not None
            for (name, path), expiry in certificates.now.expiries.items()
        },
    )


def refusal(certificates: "Certificates | None", context: Any) -> str:
    """Why a connection's peer is to be believed no more, though it was when it came; empty while it is."""
    if certificates is None or not certificates.now.ca:
        return ""
    shown = context.auth_context().get("x509_pem_cert")
    return certificates.refusal(shown[0]) if shown else ""


def guarded(certificates: "Certificates | None", method: Method[Answer]) -> Method[Answer]:
    """A method that peers who are believed no more cannot call. Raises Unauthenticated."""

    async def handle(request: Any, context: Any) -> Answer:
        if why := refusal(certificates, context):
            raise Unauthenticated(why)
        return await method(request, context)

    return method if certificates is None else handle


def guarded_stream(certificates: "Certificates | None", method: Method[None]) -> Method[None]:
    """The same of a stream, at each message: what came before is answered first."""

    async def handle(request: Any, context: Any) -> None:
        reading = _Reading(certificates, context)
        await method(request, reading)
        if reading.refused:
            raise Unauthenticated(reading.refused)

    return method if certificates is None else handle


class _Reading:
    """An RPC's context, whose stream ends where its peer is believed no more."""

    def __init__(self, certificates: "Certificates | None", context: Any) -> None:
        self.refused = ""
        self._certificates = certificates
        self._context = context

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def read(self) -> object:
        message = await self._context.read()
        self.refused = refusal(self._certificates, self._context)
        return grpc.aio.EOF if self.refused else message
