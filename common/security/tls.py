"""TLS through gRPC, at both ends: credentials of servers and channels, and peers whose certificate becomes invalid.

A server uses its newest certificates for each handshake. Connections that exist go on: long-lived streams are
asked to reopen, other connections end by their age, and a peer whose certificate is no longer valid is refused
on each (docs/decisions/0015).
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
import grpc.aio

from unlatch.common.errors import Unauthenticated
from unlatch.common.net.addresses import is_private, is_unix
from unlatch.common.net.settings import Settings
from unlatch.common.telemetry.recorder import Recorder

if TYPE_CHECKING:
    # Only for types: without TLS the import, which takes 50 ms, is not needed.
    from unlatch.common.security.certificates import Certificates

Answer = TypeVar("Answer")
Method = Callable[[Any, Any], Awaitable[Answer]]


def load(cert: str, key: str, ca: str, *, names: tuple[str, str, str]) -> "Certificates":
    """Read one end's certificates. `names` are the settings of the three paths. Raises CertificateError."""
    from unlatch.common.security.certificates import Files, load

    return load(Files(cert=cert, key=key, ca=ca, names=names))


def server_certificates(settings: Settings) -> "Certificates | None":
    """Read a service's own certificates, if it speaks TLS. Raises CertificateError."""
    if not settings.tls_cert or is_unix(settings.listen):
        return None
    names = ("--tls-cert", "--tls-key", "--tls-client-ca")
    return load(settings.tls_cert, settings.tls_key, settings.tls_client_ca, names=names)


def server_credentials(certificates: "Certificates") -> grpc.ServerCredentials:
    """A server's credentials, which follow the files at each handshake."""
    given = certificates.now

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        # Called by gRPC's threads. None means that nothing has changed.
        nonlocal given
        if certificates.now is given:
            return None
        given = certificates.now
        return _configuration(certificates)

    return grpc.dynamic_ssl_server_credentials(
        _configuration(certificates),
        fetch,  # type: ignore[arg-type]  # the stub does not allow None
        require_client_authentication=bool(given.ca),
    )


def _configuration(certificates: "Certificates") -> grpc.ServerCertificateConfiguration:
    now = certificates.now
    return grpc.ssl_server_certificate_configuration([(now.key, now.cert)], now.ca or None)


class ChannelSecurity:
    """The security of channels to servers: these certificates, or none.

    `name` is the name in the server's certificate, if that does not contain the server's address.
    """

    def __init__(self, certificates: "Certificates | None" = None, name: str = "") -> None:
        self._certificates = certificates
        self._name = name

    def open_channel(self, target: str, options: Sequence[tuple[str, Any]]) -> grpc.aio.Channel:
        """Open a channel on connections of its own, made with the present certificates."""
        # Without this, gRPC uses the proxy that http_proxy names for private addresses, too. An earlier option counts.
        options = [*options, ("grpc.enable_http_proxy", int(not is_private(target)))]
        if self._certificates is None or is_unix(target):
            return grpc.aio.insecure_channel(target, options=options)
        now = self._certificates.now
        credentials = grpc.ssl_channel_credentials(now.ca or None, now.key or None, now.cert or None)
        own: list[tuple[str, Any]] = [("grpc.use_local_subchannel_pool", 1)]
        if self._name:
            own.append(("grpc.ssl_target_name_override", self._name))
        return grpc.aio.secure_channel(target, credentials, options=[*options, *own])

    async def until_another_is_wanted(self, reopen_asked: asyncio.Event, carrying: "asyncio.Task[None]") -> None:
        """Wait until the task that carries a stream has ended, or the stream should be replaced.

        That is when either end's certificates have changed: the server asks for another stream, or our files changed.
        """
        wishes: list[asyncio.Task[Any]] = [asyncio.create_task(reopen_asked.wait())]
        if self._certificates is not None:
            wishes.append(asyncio.create_task(self._certificates.changed()))
        try:
            await asyncio.wait((carrying, *wishes), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wish in wishes:
                wish.cancel()


def report(recorder: Recorder, *ends: "Certificates | None") -> None:
    """Export when a process's certificates expire."""
    recorder.gauge(
        "unlatch_certificate_expiry_timestamp_seconds",
        "When the first of a file's certificates expires, in seconds since the epoch.",
        ("role", "file"),
        lambda: {
            (name.removeprefix("--"), path): expiry
            for certificates in ends
            if certificates is not None
            for (name, path), expiry in certificates.now.expiries.items()
        },
    )


def refusal(certificates: "Certificates | None", context: Any) -> str:
    """Why a connection's peer, once accepted, is now refused; "" if it is not."""
    if certificates is None or not certificates.now.ca:
        return ""
    shown = context.auth_context().get("x509_pem_cert")
    return certificates.refusal(shown[0]) if shown else ""


def guarded_stream(certificates: "Certificates | None", method: Method[None]) -> Method[None]:
    """A stream's method with this check for each message. Earlier messages are answered first."""

    async def handle(request: Any, context: Any) -> None:
        reading = _CheckedStream(certificates, context)
        await method(request, reading)
        if reading.refused:
            raise Unauthenticated(reading.refused)

    return method if certificates is None else handle


class _CheckedStream:
    """An RPC's context whose stream ends when its peer's certificate is no longer valid."""

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
