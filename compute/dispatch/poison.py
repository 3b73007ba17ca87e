"""Memory of calls that have killed workers, so that an equal call that is sent again does no more harm.

    suspects ──> no call of its kernel and size has a strike: the call waits for a worker
    judge ─────> one of its kernel and size has a strike: the call is read ──┬─ other ──> it waits for a worker
                                                                             └─ poison ─> FAILED_PRECONDITION
    strike ────> the call is read and remembered for `poison_seconds`; a second strike in that time makes it poison
    clear ─────> an equal call was run and did no harm: its strikes are forgotten

Equal calls have the same kernel and version, parameters, and arrays: which are given, their dtypes, shapes and bytes.
Their ids and callers do not count. To read a call is to compute a digest of all this (BLAKE2b, RFC 7693). No call is
read as long as no worker dies.

A strike counts for all equal calls, not for one call only: a call of a kernel that is not pure is not run again here,
but its caller may send it again. If a worker is killed from outside, its call gets a strike too, since the dispatcher
cannot see the difference. Equal calls then run, and clear it.
"""

import asyncio
import hashlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from time import monotonic

import msgspec

from unlatch.common.errors import FailedPrecondition, UnlatchError
from unlatch.common.telemetry.internal_errors import InternalErrors
from unlatch.compute.call import Call

# Number of workers that a call may kill: with the last of them it is poison.
_MAX_DEATHS = 2
_MAX_REMEMBERED = 1024
# Calls up to this size are read on the event loop, in 0.1 ms. A thread reads larger ones, without the interpreter lock.
_INLINE_BYTES = 64 * 1024
# Bytes of a call that are read between two checks whether its caller has left.
_PIECE_BYTES = 16 * 1024 * 1024

_Kind = tuple[str, int]
# Called once a call is read, with an error if the call is poison or could not be read, else with None.
Then = Callable[[UnlatchError | None], None]


@dataclass(slots=True)
class _Strikes:
    """The entry of a digest: how many workers its calls have killed, why the last one exited, and when to forget it."""

    kind: _Kind
    until: float
    count: int = 0
    why: str = ""


class Poison:
    """The memory of calls that killed workers, and the holder of a call while its digest is computed.

    With `poison_seconds=0` nothing is remembered.
    """

    def __init__(self, poison_seconds: float, errors: InternalErrors) -> None:
        self._poison_seconds = poison_seconds
        self._errors = errors
        # By digest, in the order of their last strikes.
        self._remembered: dict[bytes, _Strikes] = {}
        # The kinds of calls that must be read: those of remembered calls, and of calls read now for a strike.
        self._kinds: Counter[_Kind] = Counter()
        # One thread, so that reading takes no more than one core from the workers.
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="digest")

    def suspects(self, call: Call) -> bool:
        """Whether a call must be judged before it may run: one of its kernel and its size has a strike."""
        if not self._kinds:
            return False
        self._forget_old()
        return _kind(call) in self._kinds

    def judge(self, call: Call, then: Then) -> None:
        """Read a call, and call `then` with an error if it is poison, else with None."""
        call.holder = self
        self._read(call, partial(self._judge, call, then))

    def withdraw(self, call: Call) -> None:
        """Do nothing: a call whose caller leaves while it is read is dropped afterwards."""

    def strike(self, call: Call, why: str, then: Then) -> None:
        """Count that a worker has died while it ran this call, and call `then` as `judge` does."""
        call.holder = self
        call.deaths += 1
        if not self._poison_seconds:
            then(_refusal(call.deaths, why, 0.0) if call.deaths >= _MAX_DEATHS else None)
            return
        self._forget_old()
        # Before the call is read, so that equal calls that arrive meanwhile are read after it.
        self._kinds[_kind(call)] += 1
        self._read(call, partial(self._remember, call, why, then))

    def matcher(self, call: Call) -> Callable[[Call], bool]:
        """Return a test whether a waiting call may be equal to this one, as long as this one is remembered."""
        kind, digest = _kind(call), call.digest

        def matches(other: Call) -> bool:
            return digest in self._remembered and _kind(other) == kind and other.digest in (b"", digest)

        return matches

    def clear(self, call: Call) -> None:
        """Forget the strikes of a call that was run and did not kill its worker."""
        if call.digest in self._remembered:
            self._forget(call.digest)

    def close(self) -> None:
        """Stop reading calls."""
        self._reader.shutdown(wait=False, cancel_futures=True)

    def _judge(self, call: Call, then: Then, unread: UnlatchError | None) -> None:
        known = self._remembered.get(call.digest)
        if unread is None and not call.ended and known is not None and known.count >= _MAX_DEATHS:
            then(_refusal(known.count, known.why, known.until - monotonic()))
        else:
            then(unread)

    def _remember(self, call: Call, why: str, then: Then, unread: UnlatchError | None) -> None:
        kind = _kind(call)
        if unread is not None or not call.digest:
            # The call could not be read, or its caller left before it was read to its end.
            self._drop_kind(kind)
            then(unread)
            return
        known = self._remembered.pop(call.digest, None)
        if known is None:
            known = _Strikes(kind, 0.0)
            if len(self._remembered) >= _MAX_REMEMBERED:
                self._forget(next(iter(self._remembered)))
        else:
            self._drop_kind(kind)
        self._remembered[call.digest] = known
        # The call may have killed more workers than are remembered, because its entry may have been removed.
        known.count, known.why = max(known.count + 1, call.deaths), why
        known.until = monotonic() + self._poison_seconds
        then(_refusal(known.count, why, self._poison_seconds) if known.count >= _MAX_DEATHS else None)

    def _forget_old(self) -> None:
        now = monotonic()
        while self._remembered and next(iter(self._remembered.values())).until <= now:
            self._forget(next(iter(self._remembered)))

    def _forget(self, digest: bytes) -> None:
        self._drop_kind(self._remembered.pop(digest).kind)

    def _drop_kind(self, kind: _Kind) -> None:
        self._kinds[kind] -= 1
        if not self._kinds[kind]:
            del self._kinds[kind]

    def _read(self, call: Call, then: Then) -> None:
        """Give a call its digest, then call `then`: at once for a small call, else when a thread has read it."""
        if call.digest or call.block is None or call.block.size <= _INLINE_BYTES:
            call.digest = call.digest or _digest(call)
            then(None)
            return
        reading = asyncio.get_running_loop().run_in_executor(self._reader, _digest, call)
        reading.add_done_callback(partial(self._was_read, call, then))

    def _was_read(self, call: Call, then: Then, reading: "asyncio.Future[bytes]") -> None:
        if reading.cancelled():
            return
        error = None
        try:
            call.digest = reading.result()
        except Exception as unexpected:  # noqa: BLE001 (an entry point's guard)
            error = self._errors.caught("poison_read", unexpected)
        then(error)


def _kind(call: Call) -> _Kind:
    return call.spec.name, call.block.size if call.block is not None else 0


def _digest(call: Call) -> bytes:
    """Return the digest that equal calls share; empty if the caller leaves meanwhile."""
    tensors = call.tensors
    said = [[tensor.dtype, tensor.shape] for tensor in tensors]
    parameters = sorted(call.arguments.parameters.items())
    # An array that is left out is not an empty one, and the order of the others does not tell which it was.
    what = [call.spec.name, call.spec.version, parameters, said, call.arguments.left_out]
    digest = hashlib.blake2b(msgspec.msgpack.encode(what), digest_size=16)
    memory = call.block.segment.view if call.block is not None else memoryview(b"")
    for tensor in tensors:
        end = tensor.offset + tensor.length
        for start in range(tensor.offset, end, _PIECE_BYTES):
            if call.ended:
                return b""
            digest.update(memory[start : min(start + _PIECE_BYTES, end)])
    return digest.digest()


def _refusal(deaths: int, why: str, seconds: float) -> FailedPrecondition:
    return FailedPrecondition(
        f"{deaths} workers ended while they ran this call, the last time because {why}"
        + (f"; it is refused for another {max(1, round(seconds))} s" if seconds else "")
    )
