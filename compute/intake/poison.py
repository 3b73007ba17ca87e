"""Calls that workers have died of, remembered by what they are: one that is sent again does no more harm.

    offer ──> nothing like it has a strike ────────────────────────────> the queue
      └─ same kernel, same size as one that has: it is read ──┬─ other ─> the queue
                                                              └─ poison ─> FAILED_PRECONDITION
    strike ──> it is read and remembered for a while; the second strike within that makes it poison
    clear ───> one like it was run and did no harm: forgotten

What a call is, whoever sends it and under whatever id: its kernel and version, its parameters, its arrays' dtypes,
shapes and bytes; as a digest (BLAKE2b, RFC 7693). Nothing is read as long as no worker dies.

A strike stays with what it was counted for, not with the call: a kernel that is not pure is not run again by us, but
its caller may send the call again. A worker that was killed from outside gives a strike too, since nobody can tell;
calls like the one that it ran are then run, and clear it.
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

from unlatch.common.errors import FailedPrecondition
from unlatch.compute.call import Call
from unlatch.compute.dispatch.queue import Queue
from unlatch.compute.pool.exits import End

# A call is run again when its worker ends, but not when that looks like its own doing.
_MOST_DEATHS = 2
_MOST_REMEMBERED = 1024
# Read on the event loop, in a tenth of a millisecond; what is larger is read by a thread, without the interpreter lock.
_INLINE_BYTES = 64 * 1024
_RECONSIDERED_AT_ONCE = 16
# How much of a call is read before its caller is asked after.
_PIECE_BYTES = 16 * 1024 * 1024

_Kind = tuple[str, int]
# What is to happen once a worker's death is counted: with an error where the call is poison.
Then = Callable[[FailedPrecondition | None], None]


@dataclass(slots=True)
class _Strikes:
    """What is remembered under a digest."""

    kind: _Kind
    until: float
    count: int = 0
    why: str = ""


class Suspects:
    """Stands before the queue: a call is offered to it and withdrawn from it. `poison_seconds=0` remembers nothing."""

    def __init__(self, queue: Queue, poison_seconds: float) -> None:
        self._queue = queue
        self._poison_seconds = poison_seconds
        # By digest, the oldest strike first.
        self._remembered: dict[bytes, _Strikes] = {}
        # What calls are read: the kinds of those remembered, and of those about to be.
        self._kinds: Counter[_Kind] = Counter()
        # One thread: reading takes no more than one core from the workers.
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="digest")
        self._reading: set[Call] = set()

    def offer(self, call: Call) -> None:
        """Let a call go to the queue, unless it is poison."""
        if self._kinds:
            self._forget_old()
            if _kind(call) in self._kinds:
                self._read(call, partial(self._judge, call))
                return
        self._queue.offer(call)

    def withdraw(self, call: Call) -> None:
        """A call's caller has left. One that is being read is let go when that is over."""
        if call not in self._reading:
            self._queue.withdraw(call)

    def strike(self, call: Call, end: End, then: Then) -> None:
        """A worker has died while it ran this call, which is in nobody's hands until `then` is called."""
        call.deaths += 1
        if not self._poison_seconds:
            then(_refusal(call.deaths, str(end), 0.0) if call.deaths >= _MOST_DEATHS else None)
            return
        self._forget_old()
        # Before it is read: one like it that comes meanwhile is read after it.
        self._kinds[_kind(call)] += 1
        self._read(call, partial(self._remember, call, str(end), then))

    def clear(self, call: Call) -> None:
        """A call was run, and its worker lives."""
        if call.digest in self._remembered:
            self._forget(call.digest)

    def close(self) -> None:
        """Read nothing more."""
        self._reader.shutdown(wait=False, cancel_futures=True)

    def _judge(self, call: Call) -> None:
        known = self._remembered.get(call.digest)
        if call.ended:
            call.release()
        elif known is not None and known.count >= _MOST_DEATHS:
            call.fail(_refusal(known.count, known.why, known.until - monotonic()))
            call.release()
        else:
            self._queue.offer(call)

    def _remember(self, call: Call, why: str, then: Then) -> None:
        kind = _kind(call)
        if not call.digest:
            # Its caller has left, and it was not read to its end.
            self._drop_kind(kind)
            then(None)
            return
        known = self._remembered.pop(call.digest, None)
        if known is None:
            known = _Strikes(kind, 0.0)
            if len(self._remembered) >= _MOST_REMEMBERED:
                self._forget(next(iter(self._remembered)))
        else:
            self._drop_kind(kind)
        self._remembered[call.digest] = known
        # The call itself may know of more: what was remembered of it may have had to go.
        known.count, known.why = max(known.count + 1, call.deaths), why
        known.until = monotonic() + self._poison_seconds
        if known.count < _MOST_DEATHS:
            then(None)
            return
        then(_refusal(known.count, why, self._poison_seconds))
        self._reconsider(kind, call.digest)

    def _reconsider(self, kind: _Kind, poison: bytes) -> None:
        """Hold what waits against what is known now. By turns, since many may wait."""
        if poison not in self._remembered:
            return  # it was cleared meanwhile
        found = self._queue.take_back(
            lambda call: _kind(call) == kind and call.digest in (b"", poison), _RECONSIDERED_AT_ONCE
        )
        for call in found:
            self.offer(call)
        if found:
            asyncio.get_running_loop().call_soon(self._reconsider, kind, poison)

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

    def _read(self, call: Call, then: Callable[[], None]) -> None:
        """Give a call its digest, and go on: at once, or when a thread has read it."""
        if call.digest or call.block is None or call.block.size <= _INLINE_BYTES:
            call.digest = call.digest or _digest(call)
            then()
            return
        self._reading.add(call)
        reading = asyncio.get_running_loop().run_in_executor(self._reader, _digest, call)
        reading.add_done_callback(partial(self._was_read, call, then))

    def _was_read(self, call: Call, then: Callable[[], None], reading: "asyncio.Future[bytes]") -> None:
        self._reading.discard(call)
        if not reading.cancelled():
            call.digest = reading.result()
            then()


def _kind(call: Call) -> _Kind:
    return call.spec.name, call.block.size if call.block is not None else 0


def _digest(call: Call) -> bytes:
    """What a call is; nothing when its caller leaves meanwhile."""
    tensors = call.tensors
    said = [[tensor.dtype, tensor.shape] for tensor in tensors]
    parameters = sorted(call.arguments.parameters.items())
    digest = hashlib.blake2b(
        msgspec.msgpack.encode([call.spec.name, call.spec.version, parameters, said]), digest_size=16
    )
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
