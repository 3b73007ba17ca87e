"""Errors on a lane: an error becomes a reply's failure, and a failure becomes an error again."""

from unlatch.common.errors import UnlatchError, error_class
from unlatch.protos.unlatch_pb2 import Failure, Reply


def failed(error: UnlatchError) -> Reply:
    """Return the reply that tells a call's caller of an error."""
    failure = Failure(
        code=error.code,
        message=error.message,
        field=error.field,
        retry_after_milliseconds=error.retry_after_milliseconds,
        quota=error.quota,
        not_begun=error.not_begun,
    )
    return Reply(failure=failure)


def raised(failure: Failure) -> UnlatchError:
    """Return the error that a reply's failure tells of."""
    return error_class(failure.code)(
        failure.message,
        field=failure.field,
        retry_after_milliseconds=failure.retry_after_milliseconds,
        quota=failure.quota,
        not_begun=failure.not_begun,
    )
