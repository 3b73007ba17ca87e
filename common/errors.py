"""Every error that Unlatch answers with: a small flat tree, each carrying its gRPC status code.

Only these errors' text reaches a caller. Anything else is logged whole and answered as Internal with an opaque id
(see `opaque`). The codes are google.rpc.Code's numbers, so that this module needs no gRPC: workers load it too.
"""

import difflib
import secrets
from collections.abc import Iterable, Mapping
from typing import ClassVar

# A status travels in trailers, percent-encoded and once more in each of its details. From 8 KiB on gRPC drops trailers,
# and the status with them. The frames between front and worker are bounded too.
_MOST_MESSAGE_BYTES = 1024
_MOST_FIELD_BYTES = 64


def _bounded(text: str, most_bytes: int) -> str:
    """What UTF-8 can hold of a text, cut to so many bytes of it."""
    encoded = text.encode(errors="replace")
    return encoded[:most_bytes].decode(errors="ignore")


class UnlatchError(Exception):
    """A call that did not end well. `code` is its google.rpc.Code.

    `field` names the argument at fault, if one is; `quota` whose quota was used up, if one was.
    """

    code: ClassVar[int] = 2

    def __init__(self, message: str, *, field: str = "", retry_after_milliseconds: int = 0, quota: str = "") -> None:
        # A kernel may raise KernelError of anything at all.
        self.message = _bounded(str(message), _MOST_MESSAGE_BYTES)
        super().__init__(self.message)
        self.field = _bounded(field, _MOST_FIELD_BYTES)
        self.retry_after_milliseconds = retry_after_milliseconds
        self.quota = _bounded(quota, _MOST_FIELD_BYTES)

    @property
    def status(self) -> str:
        """What gRPC calls its code."""
        return NAMES[self.code]


class Cancelled(UnlatchError):
    """The caller left. Nobody reads this answer, it only counts."""

    code = 1


class InvalidArgument(UnlatchError):
    """The call itself is wrong; sent again it will be wrong again. Mend the field that the message names."""

    code = 3


class DeadlineExceeded(UnlatchError):
    """The time given ran out. Give more, or find out from the metrics where it went."""

    code = 4


class NotFound(UnlatchError):
    """No replica has that kernel in that version. The message lists near names."""

    code = 5


class PermissionDenied(UnlatchError):
    """The caller is known, and may not do this. The message says what it may; whoever runs the gateway can grant it."""

    code = 7


class ResourceExhausted(UnlatchError):
    """A bound was reached, and the message says which. Come back later, or send less."""

    code = 8


class FailedPrecondition(UnlatchError):
    """This call has done harm before, and is not run again. Find out from the log what it does to its worker."""

    code = 9


class Unimplemented(UnlatchError):
    """Unlatch does not offer this."""

    code = 12


class Internal(UnlatchError):
    """A fault in a kernel or in Unlatch. The server's log has the whole story under the id in the message."""

    code = 13


class Unavailable(UnlatchError):
    """The call met a process that ended, or none to run it. Sending it again is reasonable."""

    code = 14


class Unauthenticated(UnlatchError):
    """Nobody knows who calls: no token, or one that does not hold. The message says what is wrong with it."""

    code = 16


class KernelError(InvalidArgument):
    """Raised by a kernel to refuse its arguments' values. The text reaches the caller as it stands."""


_BY_CODE: dict[int, type[UnlatchError]] = {kind.code: kind for kind in UnlatchError.__subclasses__()}

NAMES = {
    0: "OK",
    1: "CANCELLED",
    2: "UNKNOWN",
    3: "INVALID_ARGUMENT",
    4: "DEADLINE_EXCEEDED",
    5: "NOT_FOUND",
    7: "PERMISSION_DENIED",
    8: "RESOURCE_EXHAUSTED",
    9: "FAILED_PRECONDITION",
    12: "UNIMPLEMENTED",
    13: "INTERNAL",
    14: "UNAVAILABLE",
    16: "UNAUTHENTICATED",
}


def from_code(
    code: int, message: str, *, field: str = "", retry_after_milliseconds: int = 0, quota: str = ""
) -> UnlatchError:
    """The error that a code stands for; UnlatchError itself where Unlatch does not use the code."""
    kind = _BY_CODE.get(code, UnlatchError)
    return kind(message, field=field, retry_after_milliseconds=retry_after_milliseconds, quota=quota)


def opaque(what: str) -> tuple[Internal, str]:
    """An Internal error that tells its caller nothing but an id, and the id to log the whole story under."""
    identity = secrets.token_hex(6)
    return Internal(f"{what}; the server's log has it under {identity}"), identity


def no_kernel(name: str, version: str, versions: Mapping[str, str]) -> NotFound:
    """What is said of a kernel that nobody serves, or not in that version; `versions` are those that are served."""
    served = versions.get(name)
    if served is not None:
        return NotFound(f"kernel {name} has version {served}, not {version[:64]!r}", field="model_version")
    return NotFound(f"there is no kernel {name[:64]!r}{near(name, versions)}", field="model_name")


def near(name: str, known: Iterable[str]) -> str:
    """'; did you mean …?' where a known name is near, else what there is, else nothing."""
    known = sorted(known)
    # difflib's cost grows with the product of the lengths, and a caller chooses this one.
    close = difflib.get_close_matches(name[:64], known, n=3, cutoff=0.5)
    if close:
        return f"; did you mean {' or '.join(close)}?"
    return f"; there are {', '.join(known[:20])}" if known else ""


class CertificateError(ValueError):
    """A file of TLS's that is not what it should be; the message names who gave it, the file, and what is wrong.

    No answer to a call: who starts a service or a client hears of it.
    """
