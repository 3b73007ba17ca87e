"""The forkserver's process: imports NumPy and the kernels once, and forks a worker for each Fork frame.

    python -c "from unlatch.compute.worker.forkserver import main; main(CHANNEL)"

The other end is `compute/pool/forkserver.py`, and the frames between them are `compute/ipc/fork_frames.py`. The
interpreter may be another one than the dispatcher's, and lack what a worker needs. So this module imports nothing but
Python's own library before it has told the versions of what is there; `forks.py` is the rest.

It runs by `-c`, and so do the workers: `__main__` has no file that the processes of a kernel would import again.
"""

import json
import os
import socket

from unlatch.common.service.early import die_with_parent
from unlatch.compute.worker import versions


def main(channel: int) -> None:
    """Serve the dispatcher at the other end of this socket until it closes it."""
    # While it imports kernels, which may take for ever, the forkserver does not see that its socket is closed.
    die_with_parent(os.getppid())
    to_dispatcher = socket.socket(fileno=channel)
    to_dispatcher.set_inheritable(False)
    found = versions.found()
    to_dispatcher.send(json.dumps(found).encode())
    # The dispatcher says what is missing.
    if all(found.values()):
        from unlatch.compute.worker.forks import serve

        serve(to_dispatcher)
