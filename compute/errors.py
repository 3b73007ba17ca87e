"""The error that keeps a replica from starting."""


class StartError(Exception):
    """A worker cannot start; the message says why, with file and line where a kernel module is at fault.

    `lasting` says that the next start will fail for the same reason.
    """

    def __init__(self, message: str, *, lasting: bool = False) -> None:
        super().__init__(message)
        self.lasting = lasting


class KilledAtStartError(StartError):
    """A worker was killed by SIGKILL as it started: for want of memory, or by an operator.

    The next start may succeed.
    """
