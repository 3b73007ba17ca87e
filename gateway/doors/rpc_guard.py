"""RpcGuard: authenticates the caller of an RPC before anything of its message is read, and bounds the wait for it."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from unlatch.common.errors import DeadlineExceeded, InvalidArgument, UnlatchError
from unlatch.gateway.doors.fields import name_as_protocol
from unlatch.gateway.tenants.authentication import Authentication
from unlatch.gateway.tenants.quotas import Tenant
from unlatch.gateway.tenants.tenants import Tenants

Answer = Callable[[bytes, Any, Tenant], Awaitable[bytes]]


class RpcGuard:
    """Guards the Open Inference Protocol's RPCs. A message must come whole within `message_seconds`."""

    def __init__(self, authentication: Authentication, tenants: Tenants, message_seconds: float) -> None:
        self._authentication = authentication
        self._tenants = tenants
        self._message_seconds = message_seconds

    def tenant(self, context: Any) -> Tenant:
        """Return the tenant of an RPC's caller. Raises Unauthenticated, PermissionDenied."""
        identity, _ = self._authentication.identify(context)
        return self._tenants.of(identity.name)

    def unary(self, answer: Answer) -> Callable[[Any, Any], Awaitable[bytes]]:
        """Return a method of one message. gRPC sees one of a stream, whose messages wait until they are asked for."""

        async def handle(_: Any, context: Any) -> bytes:
            try:
                tenant = self.tenant(context)
                return await answer(await self._message(context), context, tenant)
            except UnlatchError as error:
                name_as_protocol(error)
                raise

        return handle

    async def _message(self, context: Any) -> bytes:
        try:
            async with asyncio.timeout(self._message_seconds):
                message = await context.read()
        except TimeoutError:
            raise DeadlineExceeded(
                f"the request was not here after message_seconds={self._message_seconds:g}"
            ) from None
        if not isinstance(message, bytes):
            # Where gRPC has refused it (it was too large), its caller hears that instead.
            raise InvalidArgument("no request came")
        return message
