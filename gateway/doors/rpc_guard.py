"""RpcGuard: authenticates the caller of an RPC before anything of its message is read, and bounds the wait for it.

The guard also counts the RPCs, and makes statuses of their errors: only the text of our own errors reaches a caller.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeVar

from unlatch.common.errors import DeadlineExceeded, InvalidArgument, Unauthenticated, UnlatchError
from unlatch.common.net.rpc import abort
from unlatch.common.overdue import Overdue
from unlatch.common.security.tls import guarded_stream, refusal
from unlatch.gateway.doors.fields import name_as_protocol
from unlatch.gateway.metrics import GatewayMetrics
from unlatch.gateway.tenants.authentication import Authentication
from unlatch.gateway.tenants.quotas import Tenant
from unlatch.gateway.tenants.tenants import Tenants

if TYPE_CHECKING:
    from unlatch.common.security.certificates import Certificates

SERVICE = "inference.GRPCInferenceService"

Result = TypeVar("Result")
# A method as gRPC calls it: with the request, or a stream of them, and the RPC's context.
Method = Callable[[Any, Any], Awaitable[Result]]
Answer = Callable[[bytes, Any, Tenant], Awaitable[bytes]]


class RpcGuard:
    """Guards the Open Inference Protocol's RPCs. A message must come whole within `message_seconds`."""

    def __init__(
        self,
        certificates: "Certificates | None",
        authentication: Authentication,
        tenants: Tenants,
        metrics: GatewayMetrics,
        message_seconds: float,
    ) -> None:
        self._certificates = certificates
        self._authentication = authentication
        self._tenants = tenants
        self._metrics = metrics
        self._message_seconds = message_seconds
        # The tasks of RPCs that wait for a message. Those that wait for too long are cancelled.
        self._waiting = Overdue[asyncio.Task[Any]](message_seconds, _cancel)

    def tenant(self, context: Any) -> Tenant:
        """Return the tenant of an RPC's caller. Raises Unauthenticated, PermissionDenied."""
        if why := refusal(self._certificates, context):
            raise Unauthenticated(why)
        identity, _ = self._authentication.identify(context)
        return self._tenants.of(identity.name)

    def unary(self, name: str, answer: Answer) -> Method[bytes]:
        """Return a method of one message. gRPC sees one of a stream, whose messages wait until they are asked for."""

        async def handle(_: Any, context: Any) -> bytes:
            tenant = self.tenant(context)
            return await answer(await self._message(context), context, tenant)

        return self._counted(name, handle, "unary")

    def stream(self, name: str, method: Method[None]) -> Method[None]:
        """Return a method of many messages. The caller's certificate is checked with each."""
        return self._counted(name, guarded_stream(self._certificates, method), "bidi_stream")

    def _counted(self, name: str, method: Method[Result], kind: str) -> Method[Result]:
        metrics, labels = self._metrics, (kind, SERVICE, name)
        started, handling = metrics.rpcs_started.labels(*labels), metrics.rpc_seconds.labels(*labels)

        async def handle(request: Any, context: Any) -> Result:
            began = perf_counter()
            started.add()
            code = "CANCELLED"
            try:
                result = await method(request, context)
                code = "OK"
            except UnlatchError as error:
                code = error.status
                await abort(context, name_as_protocol(error))
            except Exception as unexpected:  # noqa: BLE001 (the guard: the caller hears of it)
                code = "INTERNAL"
                await abort(context, metrics.errors.caught("rpc", unexpected))
            finally:
                metrics.rpcs_handled.add(1, *labels, code)
                handling.observe(perf_counter() - began)
            return result

        return handle

    async def _message(self, context: Any) -> bytes:
        task = asyncio.current_task()
        assert task is not None
        self._waiting.begin(task)
        try:
            message = await context.read()
        except asyncio.CancelledError:
            if self._waiting.end(task):
                raise
            task.uncancel()
            raise DeadlineExceeded(
                f"the request was not here after message_seconds={self._message_seconds:g}"
            ) from None
        finally:
            self._waiting.end(task)
        if not isinstance(message, bytes):
            # Where gRPC has refused it (it was too large), its caller hears that instead.
            raise InvalidArgument("no request came")
        return message


def _cancel(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
