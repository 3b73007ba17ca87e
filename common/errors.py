"""Errors that Unlatch answers with: a small flat tree, each class with its gRPC status code.

Only the text of these errors reaches a caller. Any other exception is logged with its traceback, and answered as
Internal with an opaque id (see `opaque`). The codes are google.rpc.Code's numbers, so that this module needs no gRPC:
workers load it too.
"""

import difflib
import re
import secrets
from collections.abc import Iterable, Mapping
from typing import ClassVar

# A status travels in trailers, percent-encoded and once more in each of its details. gRPC drops trailers of 8 KiB or
# more, and the status with them. The frames between dispatcher and worker are bounded too.
_MAX_MESSAGE_BYTES = 1024
_MAX_FIELD_BYTES = 64
# Names that a message lists.
_MAX_LISTED = 20
# In the message of a call that is not sent again, since its kernel is not pure.
POSSIBLE_EFFECT = "the call may have begun, and may have had an effect"
# Characters of a value that a message shows.
_MAX_SHOWN = 64


def _bounded(text: str, most_bytes: int) -> str:
    """Make a text valid UTF-8 of at most `most_bytes`."""
    encoded = text.encode(errors="replace")
    return encoded[:most_bytes].decode(errors="ignore")


class UnlatchError(Exception):
    """The failure of a call. `code` is its google.rpc.Code.

    `field` names the argument at fault, if there is one. `quota` names the tenant whose quota was used up, if one was.
    `item` is the number of the item, from 0, if the call was one of a client's map. `not_begun` says that the call was
    certainly not begun, and may be sent to another server.
    """

    code: ClassVar[int] = 2

    def __init__(
        self,
        message: str,
        *,
        field: str = "",
        retry_after_milliseconds: int = 0,
        quota: str = "",
        not_begun: bool = False,
    ) -> None:
        # `message` may be any object, since a kernel may raise KernelError with anything.
        self.message = _bounded(str(message), _MAX_MESSAGE_BYTES)
        super().__init__(self.message)
        self.field = _bounded(field, _MAX_FIELD_BYTES)
        self.retry_after_milliseconds = retry_after_milliseconds
        self.quota = _bounded(quota, _MAX_FIELD_BYTES)
        self.item: int | None = None
        self.not_begun = not_begun

    @property
    def status(self) -> str:
        """The name of the code in gRPC."""
        return NAMES[self.code]


class Cancelled(UnlatchError):
    """The caller left. No caller reads this answer; it is only counted."""

    code = 1


class InvalidArgument(UnlatchError):
    """The call itself is wrong, and would be wrong again. Fix the field that the message names."""

    code = 3


class DeadlineExceeded(UnlatchError):
    """The call's time ran out. Give it more time, or find in the metrics where the time went."""

    code = 4


class NotFound(UnlatchError):
    """No replica has this kernel in this version. The message lists similar names."""

    code = 5


class PermissionDenied(UnlatchError):
    """The caller is known, but may not do this. The message says what it may; the gateway's operator can grant more."""

    code = 7


class ResourceExhausted(UnlatchError):
    """A limit was reached, and the message says which. Retry later, or send less."""

    code = 8


class FailedPrecondition(UnlatchError):
    """The call killed workers before and is not run again (the log has the reason), or its client cannot be used."""

    code = 9


class Aborted(UnlatchError):
    """The process that had the call ended, and the call may have had an effect. Find out before you send it again.

    Only calls of kernels that are not pure end so. No part of Unlatch sends them again by itself.
    """

    code = 10


class Unimplemented(UnlatchError):
    """Unlatch does not offer this."""

    code = 12


class Internal(UnlatchError):
    """A fault in a kernel or in Unlatch. The server's log has the traceback under the id in the message."""

    code = 13


class Unavailable(UnlatchError):
    """The process that had the call ended, or none was there to run it. The call may be sent again.

    It had no effect: its kernel is pure, or it did not begin.
    """

    code = 14


class Unauthenticated(UnlatchError):
    """The caller is unknown: it gave no token or certificate, or an invalid one. The message says what is wrong."""

    code = 16


class KernelError(InvalidArgument):
    """Raised by a kernel to refuse the values of its arguments. Its text reaches the caller unchanged."""


_BY_CODE: dict[int, type[UnlatchError]] = {kind.code: kind for kind in UnlatchError.__subclasses__()}

# The names of codes in gRPC. Each class is named after its code: NotFound is NOT_FOUND.
NAMES = {0: "OK", UnlatchError.code: "UNKNOWN"} | {
    code: re.sub("(?<=[a-z])(?=[A-Z])", "_", kind.__name__).upper() for code, kind in _BY_CODE.items()
}


def error_class(code: int) -> type[UnlatchError]:
    """The error class of a code; UnlatchError itself for a code that Unlatch does not use."""
    return _BY_CODE.get(code, UnlatchError)


def opaque(what: str) -> tuple[Internal, str]:
    """An Internal error that tells its caller only an id, and the id under which to log the traceback."""
    identity = secrets.token_hex(6)
    return Internal(f"{what}; the server's log has it under {identity}"), identity


def no_kernel(name: str, version: str, versions: Mapping[str, str]) -> NotFound:
    """The error for a kernel that is not served, or not in this version. `versions` are the served ones."""
    served = versions.get(name)
    if served is not None:
        return NotFound(f"kernel {name} has version {served}, not {version[:64]!r}", field="version")
    missing = f"there is no kernel {name[:64]!r}" if name else "the call names no kernel: model_name is empty"
    return NotFound(f"{missing}{near(name, versions)}", field="kernel")


def near(name: str, known: Iterable[str]) -> str:
    """'; did you mean …?' if a known name is similar, else a list of known names, or "" if there are none."""
    known = sorted(known)
    # difflib's cost grows with the product of the lengths, and the caller chooses this one.
    close = difflib.get_close_matches(name[:64], known, n=3, cutoff=0.5)
    if close:
        return f"; did you mean {' or '.join(close)}?"
    more = f" and {len(known) - _MAX_LISTED} more" if len(known) > _MAX_LISTED else ""
    return f"; known names: {', '.join(known[:_MAX_LISTED])}{more}" if known else ""


def shown(value: object) -> str:
    """Return the first 64 characters of a value's `repr`, for a message; the value's type if it has no `repr`."""
    try:
        return repr(value)[:_MAX_SHOWN]
    except Exception:  # noqa: BLE001 (a caller's object may raise anything, and an int of over 4,300 digits does)
        return f"a value of type {type(value).__name__}"


class CertificateError(ValueError):
    """A TLS file that cannot be used. The message names the setting, the file, and the fault.

    This is no answer to a call: the program that starts a service or client gets it.
    """


class DirectoryError(Exception):
    """No directory for sockets can be made. The message says what to do. No answer to a call, either."""
