"""What there is to find: each kind with why it matters and what to do about it."""

from dataclasses import dataclass
from typing import NamedTuple


class _Kind(NamedTuple):
    is_fault: bool
    why: str
    what_to_do: str


_ENDS_INTERNAL = "such a call ends INTERNAL, and its caller gets an id and nothing else"
_KINDS = {
    "does-not-load": _Kind(True, "a service does not start with it", "mend that line"),
    "no-kernel": _Kind(True, "there is nothing to serve", "decorate a function with @kernel"),
    "threads-at-import": _Kind(
        True, "workers are forked and do not have these threads", "start them when the kernel is called first"
    ),
    "writes-to-input": _Kind(True, "inputs are read-only memory, and such a call ends INTERNAL", "copy first"),
    "wrong-result": _Kind(True, "such a call ends INTERNAL", "return what is declared, or declare what is returned"),
    "raises": _Kind(True, _ENDS_INTERNAL, "raise KernelError, which speaks to the caller, or declare what it takes"),
    "raises-unless-finite": _Kind(False, _ENDS_INTERNAL, "raise KernelError where values are not finite"),
    "does-not-end": _Kind(True, "it holds its worker meanwhile", "bound the work, or allow it more with --seconds"),
    "needs-memory": _Kind(
        True, "such a call ends RESOURCE_EXHAUSTED", "work in blocks, or allow more with --memory-mib"
    ),
    "ends-its-worker": _Kind(True, "the call, and the one behind it, end UNAVAILABLE", "find out which library it is"),
    "not-deterministic": _Kind(
        True, "pure says that a call may be run again for the same result", "seed what is random, or do not say pure"
    ),
    "keeps-state": _Kind(
        True,
        "pure says that only arguments matter, and each worker has a state of its own",
        "keep nothing between calls",
    ),
    "keeps-input": _Kind(
        True, "the block is given to the next call, whose bytes it would see", "keep a copy: x.copy()"
    ),
    "batch-differs": _Kind(True, "batch says that calls may be run together", "treat each row by itself"),
    "refuses": _Kind(False, "its caller gets INVALID_ARGUMENT and this text", "nothing, if that is what you mean"),
    "refuses-everything": _Kind(
        False, "nothing else could be tried", "give scalars that it takes: --set kernel.name=value"
    ),
    "prints": _Kind(False, "it goes to the service's stderr, at every call", "use it for debugging only"),
    "imports-slowly": _Kind(
        False, "a service starts that much later", "import what is rarely needed inside the kernel"
    ),
    "leaves-threads": _Kind(
        False, "they compete with the next call for the worker's core", "end them before it returns"
    ),
    "many-threads": _Kind(
        False, "workers times threads are more than the cores", "set no number of threads: each worker has its share"
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One fault, or one note. `place` is file:line; `detail` may have more lines: the end of a traceback."""

    place: str
    kernel: str
    kind: str
    what: str
    detail: str = ""

    @property
    def is_fault(self) -> bool:
        """Whether it must be mended; the others are for you to know."""
        return _KINDS[self.kind].is_fault

    @property
    def why(self) -> str:
        """Why it matters."""
        return _KINDS[self.kind].why

    @property
    def what_to_do(self) -> str:
        """What to do."""
        return _KINDS[self.kind].what_to_do

    def __str__(self) -> str:
        return f"{self.place}: {self.kernel}: {self.what}; {self.why}: {self.what_to_do}"
