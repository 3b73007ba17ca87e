"""Errors on a lane: as a reply's failure, and back."""

from unlatch.common.errors import UnlatchError, from_code
from unlatch.protos.unlatch_pb2 import Failure, Reply


def failed(error: UnlatchError) -> Reply:
    """The reply that tells a call's caller of an error."""
    reply = Reply()
    reply.failure.code = error.code
    reply.failure.message = error.message
    reply.failure.field = error.field
    reply.failure.retry_after_milliseconds = error.retry_after_milliseconds
    reply.failure.quota = error.quota
    return reply


def raised(failure: Failure) -> UnlatchError:
    """The error that a reply tells of."""
    return from_code(
        failure.code,
        failure.message,
        field=failure.field,
        retry_after_milliseconds=failure.retry_after_milliseconds,
        quota=failure.quota,
    )
