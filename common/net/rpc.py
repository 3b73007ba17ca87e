"""gRPC servers of both services: their options, handlers of raw bytes, and errors as statuses."""

from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

import grpc
import grpc.aio
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from unlatch.common.errors import Aborted, UnlatchError
from unlatch.common.net.addresses import is_unix
from unlatch.common.net.ports import BindError
from unlatch.common.net.settings import ServiceSettings

_CODES = {code.value[0]: code for code in grpc.StatusCode}
# The reason in the ErrorInfo of a call that may have had an effect.
MAY_HAVE_BEGUN = "MAY_HAVE_BEGUN"
_WINDOW_BYTES = 256 * 1024


def options(max_message_bytes: int, *, shares_port: bool = False) -> list[tuple[str, int]]:
    """Channel arguments of all our servers and channels. `shares_port`: other processes may listen there too."""
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        # On by default, and then a second server binds the same port without an error.
        ("grpc.so_reuseport", int(shares_port)),
        # A stalled loop must not make gRPC cancel pending requests (the default limit is 1,000 of them).
        ("grpc.server.max_pending_requests", 100_000),
        ("grpc.server.max_pending_requests_hard_limit", 200_000),
        # A small call waits behind the part of a large one that gRPC has accepted, so a stream's window is small and
        # stays so. On a lane within a datacentre that costs no throughput (docs/decisions/0006).
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", _WINDOW_BYTES),
    ]


def server_options(
    max_message_bytes: int, settings: ServiceSettings, max_connections: int, *, shares_port: bool
) -> list[tuple[str, int]]:
    """Channel arguments of a server that callers from outside may reach."""
    return [
        *options(max_message_bytes, shares_port=shares_port),
        ("grpc.max_allowed_incoming_connections", max_connections),
        ("grpc.max_concurrent_streams", settings.max_streams),
        # On by default, and then a stream counts until its memory is freed. A client does not know when that is, and
        # a new stream of a client that keeps to the limit is reset, unseen by us.
        ("grpc.http.overload_protection", 0),
        # Both the same, since gRPC would refuse only some requests between the two limits.
        ("grpc.max_metadata_size", settings.max_metadata_bytes),
        ("grpc.absolute_max_metadata_size", settings.max_metadata_bytes),
        ("grpc.server_handshake_timeout_ms", round(settings.handshake_seconds * 1e3)),
        ("grpc.keepalive_time_ms", round(settings.keepalive_seconds * 1e3)),
        # Also while a connection has no call: gRPC would allow a ping every two hours, and send none.
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", round(settings.min_ping_seconds * 1e3)),
        ("grpc.max_connection_age_ms", round(settings.connection_seconds * 1e3)),
    ]


def bind(server: grpc.aio.Server, flag: str, address: str, credentials: grpc.ServerCredentials | None = None) -> str:
    """Listen on a flag's address, in plaintext unless there are credentials. Returns it, with a free port for port 0.

    Raises BindError.
    """
    try:
        port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    except RuntimeError:
        # gRPC has logged the cause.
        raise BindError(f"{flag} {address}: cannot listen there") from None
    if is_unix(address):
        return address
    return f"{address.rpartition(':')[0]}:{port}"


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: UnlatchError) -> NoReturn:
    """End an RPC with an error, its details and its retry advice, and keep the trailers that are already set."""
    code = _CODES.get(error.code, grpc.StatusCode.UNKNOWN)
    await context.abort(code, error.message, (*(context.trailing_metadata() or ()), *_trailers(error)))
    raise AssertionError("abort always raises")


def _trailers(error: UnlatchError) -> tuple[tuple[str, str | bytes], ...]:
    """The error as details of google/rpc/error_details.proto, and gRPC's push-back.

    BadRequest for a field at fault, QuotaFailure for a used-up quota, RetryInfo for the time of a retry, ErrorInfo for
    a call that may have begun. Its push-back of -1 tells gRPC's clients not to retry, whatever their service config.
    """
    details: list[Message] = []
    trailers: list[tuple[str, str | bytes]] = []
    if error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=error.message)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.quota:
        over = error_details_pb2.QuotaFailure.Violation(subject=error.quota, description=error.message)
        details.append(error_details_pb2.QuotaFailure(violations=[over]))
    if error.retry_after_milliseconds:
        delay = Duration()
        delay.FromMilliseconds(error.retry_after_milliseconds)
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
        trailers.append(("grpc-retry-pushback-ms", str(error.retry_after_milliseconds)))
    if isinstance(error, Aborted):
        details.append(error_details_pb2.ErrorInfo(reason=MAY_HAVE_BEGUN, domain="unlatch"))
        trailers.append(("grpc-retry-pushback-ms", "-1"))
    if details:
        status = status_pb2.Status(code=error.code, message=error.message)
        for detail in details:
            packed = AnyMessage()
            packed.Pack(detail)
            status.details.append(packed)
        trailers.append(("grpc-status-details-bin", status.SerializeToString()))
    return tuple(trailers)


Unary = Callable[[Any, Any], Awaitable[bytes]]
Stream = Callable[[Any, Any], Awaitable[None]]


def handlers(
    service: str, *, unary: dict[str, Unary] | None = None, streams: dict[str, Stream] | None = None
) -> grpc.GenericRpcHandler:
    """Make a service's handlers. Each reads messages from its context when it wants; until then they wait in gRPC."""
    methods: dict[str, Any] = {
        name: grpc.stream_unary_rpc_method_handler(method) for name, method in (unary or {}).items()
    }
    for name, method in (streams or {}).items():
        methods[name] = grpc.stream_stream_rpc_method_handler(method)
    return grpc.method_handlers_generic_handler(service, methods)
