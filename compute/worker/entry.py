"""Where a worker process begins: apart from compute.worker, so that the front can name it without loading NumPy."""

import socket
from typing import Protocol


class Inherited(Protocol):
    """A descriptor as multiprocessing hands it to a child."""

    def detach(self) -> int:
        """The child's own copy."""


def enter(channel: socket.socket, front_alive: Inherited, max_reply_bytes: int, memory_bytes: int) -> None:
    """The target of a forkserver's child."""
    from unlatch.compute.worker import loop as worker

    worker.main(channel, front_alive.detach(), max_reply_bytes, memory_bytes)
