"""Errors on a lane: an error becomes a reply's failure, and a failure becomes an error again."""

from unlatch.common.errors import UnlatchError, from_code
from unlatch.protos.unlatch_pb2 import Failure, Reply


def failed(error: UnlatchError) -> Reply:
    """Return the reply that tells a call's caller of an error."""
    reply = Reply()
    reply.failure.code = error.code
    reply.failure.message = error.message
    reply.failure.field = error.field
    reply.failure.retry_after_milliseconds = error.retry_after_milliseconds
    reply.failure.quota = error.quota
    return reply


def raised(failure: Failure) -> UnlatchError:
    """Return the error that a reply's failure tells of."""
    return from_code(
        failure.code,
        failure.message,
        field=failure.field,
        retry_after_milliseconds=failure.retry_after_milliseconds,
        quota=failure.quota,
    )
