"""`python -m unlatch.gateway` (and `unlatch gateway`): the door to a fleet of replicas."""

import os
import sys
from collections.abc import Sequence

from unlatch.common.machine.leave import leave
from unlatch.common.service.early import take_over


def main(arguments: Sequence[str]) -> int:
    """Run a gateway with settings from flags and the environment; 2 when it cannot start."""
    # Read by gRPC at its import. gRPC writes to stderr, past our log: a line for each failed TLS handshake.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    from unlatch.common.service.main import run
    from unlatch.gateway.server import serve
    from unlatch.gateway.settings import GatewaySettings

    return run("unlatch gateway", "gateway", GatewaySettings, serve, arguments, os.environ)


if __name__ == "__main__":
    take_over()
    leave(main(sys.argv[1:]))
