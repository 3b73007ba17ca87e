"""`python -m unlatch.compute` (and `unlatch compute`): one replica."""

import os
import sys
from collections.abc import Sequence

from unlatch.common.machine.leave import leave
from unlatch.common.service.early import take_over


def main(arguments: Sequence[str]) -> int:
    """Run a replica with settings from flags and the environment; 2 when it cannot start."""
    # Read by gRPC at its import. gRPC writes to stderr, past our log: a line for each failed TLS handshake.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    # Imported here: a signal is heard before these are loaded, which may take a second.
    from unlatch.common.service.main import run
    from unlatch.compute.errors import KilledAtStartError, StartError
    from unlatch.compute.server import serve
    from unlatch.compute.settings import ComputeSettings

    refusals, passing = (StartError,), (KilledAtStartError,)
    return run("unlatch compute", "dispatcher", ComputeSettings, serve, arguments, os.environ, refusals, passing)


if __name__ == "__main__":
    take_over()
    leave(main(sys.argv[1:]))
