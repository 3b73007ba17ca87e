"""The entry point of a worker process, in a module of its own so that the dispatcher can name it without NumPy."""

import socket
from typing import Protocol


class Inherited(Protocol):
    """A descriptor in the form in which multiprocessing passes it to a child."""

    def detach(self) -> int:
        """Return the child's own copy."""


def enter(channel: socket.socket, dispatcher_alive: Inherited, max_reply_bytes: int, memory_bytes: int) -> None:
    """Run a worker. This is the target of a forkserver's child."""
    from unlatch.compute.worker import loop as worker

    worker.main(channel, dispatcher_alive.detach(), max_reply_bytes, memory_bytes)
