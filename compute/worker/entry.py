"""The entry point of a worker process, in a module of its own so that the dispatcher can name it without NumPy."""

import socket


def enter(channel: socket.socket, kind: str, max_reply_bytes: int) -> None:
    """Run a worker of a kind (`frames.PLAIN`, …). This is the target of a forkserver's child."""
    from unlatch.compute.worker import loop

    loop.main(channel, kind, max_reply_bytes)
