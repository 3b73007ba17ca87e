"""The queue: calls whose bytes have landed wait for a worker. The policy says who is next, the bound who may wait."""

from time import monotonic
from typing import Protocol

from common.errors import DeadlineExceeded, ResourceExhausted
from common.policy import Policy
from compute.call import Call


class Workers(Protocol):
    """What the queue needs to know of the pool."""

    def has_room(self) -> bool:
        """Whether some worker can take one more call in hand."""

    def run(self, call: Call) -> None:
        """Give a call to a worker. Only when there is room."""


class Queue:
    """Calls that wait. `max_calls` trades memory and waiting against refusals: what is over it is refused at once."""

    def __init__(self, policy: Policy[Call], max_calls: int) -> None:
        self._policy = policy
        self._workers: Workers | None = None
        self._max_calls = max_calls

    def feed(self, workers: Workers) -> None:
        """From now on calls go to these workers. (The pool in turn calls `pump` whenever it has room.)"""
        self._workers = workers

    def __len__(self) -> int:
        return len(self._policy)

    def offer(self, call: Call) -> None:
        """Let a call wait, or run at once; fail it where it may not wait."""
        if len(self._policy) >= self._max_calls:
            self._refuse(call, ResourceExhausted(f"the queue is full: max_queued_calls={self._max_calls}"))
        else:
            self._policy.add(call)
            self.pump()

    def withdraw(self, call: Call) -> None:
        """A call's caller has left: if the call still waits it is dropped."""
        if self._policy.remove(call):
            call.release()

    def pump(self) -> None:
        """Hand calls to workers while there is room."""
        workers = self._workers
        while workers is not None and workers.has_room() and (call := self._policy.next()) is not None:
            if call.deadline is not None and monotonic() > call.deadline:
                self._refuse(call, DeadlineExceeded(f"the deadline passed while kernel {call.spec.name} waited to run"))
            else:
                workers.run(call)

    @staticmethod
    def _refuse(call: Call, error: DeadlineExceeded | ResourceExhausted) -> None:
        call.fail(error)
        call.release()
