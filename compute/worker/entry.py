"""The entry point of a worker process, which the forkserver has just forked."""

import socket

from unlatch.compute.worker import loop


def enter(channel: socket.socket, dispatcher_alive: int, kind: str, max_reply_bytes: int) -> None:
    """Run a worker until the dispatcher closes the channel; `dispatcher_alive` is a pipe that breaks when it ends."""
    loop.main(channel, dispatcher_alive, kind, max_reply_bytes)
