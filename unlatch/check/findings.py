"""The kinds of findings: why each matters, and what to do about it."""

from dataclasses import dataclass
from typing import NamedTuple


class _Kind(NamedTuple):
    is_fault: bool
    why: str
    what_to_do: str


_ENDS_INTERNAL = "such a call ends INTERNAL, and its caller gets only an id"
_KINDS = {
    "does-not-load": _Kind(True, "a service with this module does not start", "fix this first"),
    "no-kernel": _Kind(True, "a service with this module does not start", "decorate a function with @kernel"),
    "threads-at-import": _Kind(
        True, "workers are forked, so they do not have these threads", "start threads in the kernel's first call"
    ),
    "writes-to-input": _Kind(True, "inputs are read-only memory, so such a call ends INTERNAL", "copy the input first"),
    "needs-writable-input": _Kind(
        True,
        "inputs are read-only memory, so such a call ends INTERNAL",
        "leave out the types in @njit(…), or declare types.Array(…, readonly=True)",
    ),
    "wrong-result": _Kind(True, "such a call ends INTERNAL", "return the declared result, or declare the returned one"),
    "raises": _Kind(
        True,
        _ENDS_INTERNAL,
        "raise KernelError, whose text the caller gets, or declare only what the kernel takes (nonempty=True)",
    ),
    "raises-unless-finite": _Kind(False, _ENDS_INTERNAL, "raise KernelError if values are not finite"),
    "does-not-end": _Kind(
        True, "its worker can run nothing else meanwhile", "bound the work, or allow more time with --seconds"
    ),
    "needs-memory": _Kind(
        True, "such a call ends RESOURCE_EXHAUSTED", "work in blocks, or allow more with --memory-mib"
    ),
    "ends-its-worker": _Kind(
        True,
        "such a call ends ABORTED, or FAILED_PRECONDITION if the kernel is pure",
        "find the library that ends the process",
    ),
    "not-deterministic": _Kind(
        True, "a pure kernel may be run again and must give the same result", "seed random numbers, or remove pure"
    ),
    "keeps-state": _Kind(
        True,
        "a pure kernel's result depends on its arguments only, and each worker has its own state",
        "keep nothing between calls",
    ),
    "draws-the-same": _Kind(
        True,
        "each worker, and each one that replaces it, draws the same numbers",
        "draw from unlatch.rng(), or take a seed as a scalar",
    ),
    "keeps-input": _Kind(
        True, "the next call uses the same memory, so the kernel would see its bytes", "keep a copy: x.copy()"
    ),
    "batch-differs": _Kind(True, "calls of a batch kernel may run together", "compute each row by itself"),
    "refuses": _Kind(False, "the caller gets INVALID_ARGUMENT with this text", "nothing, if this is intended"),
    "refuses-everything": _Kind(
        False, "the other rules could not be checked", "set accepted scalars: --set kernel.name=value"
    ),
    "prints": _Kind(False, "each call writes to the service's stderr", "print for debugging only"),
    "warns": _Kind(
        False,
        "each worker writes it to the service's stderr once, and callers do not see it",
        "refuse or treat such inputs, or silence it (np.errstate, warnings.filterwarnings)",
    ),
    "imports-slowly": _Kind(
        False, "a service starts later by this time", "import rarely used modules inside the kernel"
    ),
    "leaves-threads": _Kind(
        False, "these threads compete with the next call for the worker's core", "end them before the kernel returns"
    ),
    "many-threads": _Kind(
        False,
        "all workers' threads together are more than the cores",
        "do not set a number of threads: each worker has its share",
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A fault or a note. `place` is file:line; `detail` may have several lines: the end of a traceback."""

    place: str
    kernel: str
    kind: str
    what: str
    detail: str = ""

    @property
    def is_fault(self) -> bool:
        """Whether this must be fixed; other findings are information."""
        return _KINDS[self.kind].is_fault

    @property
    def why(self) -> str:
        """Why the finding matters."""
        return _KINDS[self.kind].why

    @property
    def what_to_do(self) -> str:
        """How to fix the finding."""
        return _KINDS[self.kind].what_to_do

    def __str__(self) -> str:
        return f"{self.place}: {self.kernel}: {self.what}; {self.why}: {self.what_to_do}"
