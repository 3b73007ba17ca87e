"""The entry point of a worker process, in a module of its own so that the dispatcher can name it without NumPy."""

import socket


def enter(channel: socket.socket, max_reply_bytes: int, memory_bytes: int) -> None:
    """Run a worker. This is the target of a forkserver's child."""
    from unlatch.compute.worker import loop

    loop.main(channel, max_reply_bytes, memory_bytes)
